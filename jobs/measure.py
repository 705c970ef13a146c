"""How every benchmark measures: interleaved repetitions after a warm-up, medians, ratios within one process.

Other work on a machine disturbs measurements. So two figures that are compared are measured in turn (A B A B ...). Their ratio
is the median of the pairs' ratios.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixgf.storage import s3


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number: `value` in `unit`, beside the `baseline` in the same unit and the `ratio` of the two."""

    figure: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    bar: str = ""
    """What we have set ourselves, in words: of the ratio (`2.7x`) or of the value."""

    def row(self) -> dict[str, Any]:
        """The JSON form, rounded to five significant digits."""
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


def seconds(work: Callable[[], object], *, cpu: bool = False) -> float:
    """Wall seconds of one call, or its CPU seconds over all threads of this process."""
    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    work()
    return clock() - start


def interleaved(
    works: dict[str, Callable[[], object]], *, repeats: int = 3, warmups: int = 1, cpu: bool = False
) -> dict[str, list[float]]:
    """Seconds of every piece of work, measured in turn `repeats` times after `warmups` uncounted rounds."""
    for _ in range(warmups):
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, cpu=cpu))
    return times


def rate(
    name: str, unit: str, amount: float, *, times: dict[str, list[float]], key: str, against: str = "", bar: str = ""
) -> Figure:
    """The figure `amount / seconds` of one piece of work, with the ratio to another one where there is one."""
    value = amount / statistics.median(times[key])
    if not against:
        return Figure(figure=name, value=value, unit=unit, bar=bar)
    ratio = statistics.median(b / a for a, b in zip(times[key], times[against], strict=True))
    baseline = amount / statistics.median(times[against])
    return Figure(figure=name, value=value, unit=unit, baseline=baseline, ratio=ratio, bar=bar)


def peak_memory() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def fast_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices itself; where it does not, bf16 only costs."""
    import torch

    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def forked(works: list[Callable[[], Any]]) -> list[Any]:
    """What functions return that run at the same time in forks of this process."""
    with tempfile.TemporaryDirectory(prefix="mixgf-bench-") as folder:
        pids = []
        for i, work in enumerate(works):
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    (Path(folder) / str(i)).write_text(json.dumps(work()))
                    status = 0
                finally:
                    os._exit(status)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        return [json.loads((Path(folder) / str(i)).read_text()) for i in range(len(works))]


@contextmanager
def s3_server(log: Path | None = None) -> Iterator[str]:
    """A bucket of moto's server on loopback; yields its URI.

    Args:
        log: file that gets one line per request.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (log or Path(os.devnull)).open("wb") as sink:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        s3.request("s3://bench", lambda fs, key: fs.mkdir(key))
        yield "s3://bench"
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        s3.forget_connections()
