"""What it costs that files are verified: `bench.py seals`.

Every stage runs on the bundled cells in this process, in turn with all checks and without them. Checks: SHA-256 and CRC-32 of what
is written and read, page checksums of Parquet, hashes of sources, seals of JSON. Without them, the functions that compute them
return constants. Figures are CPU seconds; the ratio is the median of the pairs. `checks` is the CPU time inside these functions
alone (page checksums, which pyarrow computes, not included) as a share of the stage: its error is far smaller than that of the ratio.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
from measure import Figure

from mixgf.config import recipes
from mixgf.config.parse import fingerprint
from mixgf.config.run import Config, Inputs, Tracking
from mixgf.encoder import checkpoint
from mixgf.execution import LocalExecutor
from mixgf.stages import classify, compare, embed, finetune, perturb, prepare, pretrain, tune
from mixgf.storage import files, sealed, tables

STAGES: dict[str, Any] = {
    "prepare": prepare, "pretrain": pretrain, "embed": embed, "classify": classify, "finetune": finetune, "perturb": perturb,
    "compare": compare, "tune": tune,
}  # fmt: skip


class _Nothing:
    """A digest that looks at nothing."""

    def update(self, _: Any) -> None:
        pass

    def digest(self) -> bytes:
        return bytes(32)

    def hexdigest(self) -> str:
        return "0" * 64


class _Clock:
    """CPU seconds of the thread inside functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - start

        return call

    def sha256(self, data: Any = b"") -> Any:
        """A digest whose work is timed."""
        start = time.thread_time()
        made = hashlib.sha256(data)
        self.seconds += time.thread_time() - start
        return SimpleNamespace(update=self.timed(made.update), digest=made.digest, hexdigest=made.hexdigest)


def _no_sha256(_: Any = b"") -> _Nothing:
    return _Nothing()


def _no_crc32(*_: Any) -> int:
    return 0


def _no_text(_: Any) -> str:
    return "0" * 64


def _writer(*args: Any, write_page_checksum: bool, **kwargs: Any) -> pq.ParquetWriter:
    return pq.ParquetWriter(*args, **kwargs)


def _reader(*args: Any, page_checksum_verification: bool, **kwargs: Any) -> pq.ParquetFile:
    return pq.ParquetFile(*args, **kwargs)


def _places_of(function: Any) -> list[tuple[Any, str]]:
    """The modules of mixgf that have a function, and its name there."""
    modules = [module for name, module in sys.modules.items() if name.startswith("mixgf.")]
    return [(module, name) for module in modules for name, value in vars(module).items() if value is function]


@contextmanager
def _checks(*, on: bool) -> Iterator[_Clock]:
    """All checks with a clock in them, or none."""
    clock = _Clock()
    with ExitStack() as stack:

        def put(module: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        digest: Callable[..., Any] = clock.sha256 if on else _no_sha256
        for module in (tables, checkpoint):
            put(module, "hashlib", SimpleNamespace(sha256=digest))
        put(tables, "zlib", SimpleNamespace(crc32=clock.timed(zlib.crc32) if on else _no_crc32))
        put(sealed, "fingerprint", clock.timed(fingerprint) if on else _no_text)
        for module, name in _places_of(files.sha256):
            put(module, name, clock.timed(files.sha256) if on else _no_text)
        if not on:
            plain: dict[str, Any] = {"ParquetWriter": _writer, "ParquetFile": _reader}
            put(tables, "pq", SimpleNamespace(**vars(pq) | plain))
        yield clock


def _config(folder: str, *, quick: bool) -> Config:
    base = recipes.get("demo")
    return replace(
        base, output=folder, tracking=Tracking(uri="off"), compute=replace(base.compute, num_workers=1),
        qc=replace(base.qc, max_cells_per_sample=100 if quick else base.qc.max_cells_per_sample),
        train=replace(base.train, max_steps=4 if quick else 60, checkpoint_steps=4 if quick else 30),
        classify=replace(base.classify, epochs=1, splits=("random",), models=("finetune", "probe", "knn", "hvg_logreg", "majority")),
        perturb=replace(base.perturb, max_cells=10 if quick else 30, max_genes=10 if quick else 60, num_permutations=100),
        compare=replace(base.compare, controls=("majority", "pca_knn"), models=("knn",), cells=200 if quick else 2_000),
        tune=replace(base.tune, space=({"objective.contrast_weight": (0.0,)},), seeds=1, splits=("random",), finetune=False),
    )  # fmt: skip


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """CPU seconds of every stage with and without checks, and the share of the checks."""
    repeats = 1 if quick else 3
    with tempfile.TemporaryDirectory() as folder:
        made = {on: _config(f"{folder}/{on}", quick=quick) for on in (True, False)}
        for name, stage in STAGES.items():
            pairs, shares, number = [], [], 0
            for number in range(repeats + 1):  # the first round is a warm-up, and makes what the next stage reads
                took = {}
                for on in (True, False) if number % 2 else (False, True):
                    config = made[on]
                    if number:
                        inputs = Inputs(
                            corpus=f"{config.output}/corpus", checkpoint=f"{config.output}/pretrain",
                            embeddings=f"{config.output}/embed",
                        )  # fmt: skip
                        inputs = Inputs() if name == "prepare" else inputs
                        config = replace(config, output=f"{config.output}/{name}-{number}", inputs=inputs)
                    with _checks(on=on) as clock:
                        start = time.process_time()
                        stage.run(config, executor=LocalExecutor())
                        took[on] = time.process_time() - start
                    if on:
                        shares.append(clock.seconds / took[True])
                pairs.append((took[True], took[False]))
            counted = pairs[1:]
            with_checks, without = (statistics.median(pair[i] for pair in counted) for i in (0, 1))
            ratio = statistics.median(a / b for a, b in counted)
            yield Figure(figure=f"{name}: with checks / without", value=with_checks, unit="CPU s", baseline=without, ratio=ratio, bar="1.03x")  # fmt: skip
            yield Figure(figure=f"{name}: checks", value=100 * statistics.median(shares[1:]), unit="% of the stage", bar="3")  # fmt: skip
