"""What it costs that files are verified: `bench.py seals`.

Every stage runs on the bundled cells in this process, with a clock of CPU time in the checks: SHA-256 and CRC-32 of what is written
and read, hashes of sources with the reads for them, seals of Parquet and JSON. The checksums of Parquet's pages are computed inside
pyarrow. Their cost is the bytes of all files that are written or opened, times the seconds per byte that pyarrow takes more with
them; not all pages of an opened file are read, so this is an upper bound. The figure is the share of all this in the CPU time of the
stage, the median of the rounds. It does not need a run without checks, whose difference is smaller than the noise.
"""

from __future__ import annotations

import hashlib
import io
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import Figure, interleaved

from mixgf.cells import open as sources
from mixgf.cells import qc
from mixgf.config import recipes
from mixgf.config.parse import fingerprint
from mixgf.config.run import Config, Inputs, Tracking
from mixgf.corpus import prepare_passes
from mixgf.encoder import checkpoint
from mixgf.execution import LocalExecutor
from mixgf.stages import classify, compare, embed, finetune, perturb, prepare, pretrain, tune
from mixgf.storage import files, sealed, tables

STAGES: dict[str, Any] = {
    "prepare": prepare, "pretrain": pretrain, "embed": embed, "classify": classify, "finetune": finetune, "perturb": perturb,
    "compare": compare, "tune": tune,
}  # fmt: skip


class _Clock:
    """CPU seconds of the threads inside functions, those of functions inside functions once, and bytes of Parquet files."""

    def __init__(self) -> None:
        self.seconds, self.parquet_bytes = 0.0, 0
        self.inside = threading.local()

    @contextmanager
    def running(self) -> Iterator[None]:
        if getattr(self.inside, "now", False):
            yield
            return
        self.inside.now, start = True, time.thread_time()
        try:
            yield
        finally:
            self.inside.now, self.seconds = False, self.seconds + time.thread_time() - start

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return work(*args, **kwargs)

        return call

    def sha256(self, data: Any = b"") -> Any:
        """A digest whose work is timed."""
        with self.running():
            made = hashlib.sha256(data)
        return SimpleNamespace(update=self.timed(made.update), digest=made.digest, hexdigest=made.hexdigest)

    def opened(self, uri: str, file: Any) -> None:
        """`tables._check_seal`, timed, which every Parquet file passes that is opened."""
        with self.running():
            tables_check_seal(uri, file)
            self.parquet_bytes += file.seek(0, io.SEEK_END)
            file.seek(0)


tables_check_seal, hashing_file_seal = tables._check_seal, tables._HashingFile.seal


def _places_of(function: Any) -> list[tuple[Any, str]]:
    """The modules of mixgf that have a function, and its name there."""
    modules = [module for name, module in sys.modules.items() if name.startswith("mixgf.")]
    return [(module, name) for module in modules for name, value in vars(module).items() if value is function]


@contextmanager
def _clocked() -> Iterator[_Clock]:
    """All checks have a clock in them."""
    clock = _Clock()
    with ExitStack() as stack:

        def put(module: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        def seal(file: Any) -> None:
            hashing_file_seal(file)
            clock.parquet_bytes += file.num_bytes

        for module in (tables, checkpoint, qc, sources):
            put(module, "hashlib", SimpleNamespace(**vars(hashlib) | {"sha256": clock.sha256}))
        put(tables, "zlib", SimpleNamespace(crc32=clock.timed(zlib.crc32)))
        put(prepare_passes, "_add_values", clock.timed(prepare_passes._add_values))
        put(tables, "_check_seal", clock.opened)
        put(tables._HashingFile, "seal", seal)
        put(sealed, "fingerprint", clock.timed(fingerprint))
        for module, name in _places_of(files.sha256):
            put(module, name, clock.timed(files.sha256))
        yield clock


def _page_seconds(num_bytes: int) -> float:
    """CPU seconds per byte that pyarrow takes for the checksums of pages, written or read, whichever is more."""
    table = pa.table({"a": np.random.default_rng(0).integers(0, 1 << 62, num_bytes // 8)})

    def written(*, checked: bool) -> pa.BufferOutputStream:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=checked)
        return sink

    data = written(checked=True).getvalue()

    def read(*, checked: bool) -> None:
        pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=checked).read(use_threads=False)

    more = []
    for work in (written, read):
        both: dict[str, Callable[[], object]] = {
            name: partial(work, checked=name == "with") for name in ("with", "without")
        }
        took = interleaved(both, repeats=9, cpu=True)
        more.append(statistics.median(a - b for a, b in zip(took["with"], took["without"], strict=True)))
    return max(*more, 0.0) / num_bytes


def _config(folder: str, *, quick: bool) -> Config:
    base = recipes.get("demo")
    return replace(
        base, output=folder, tracking=Tracking(uri="off"), compute=replace(base.compute, num_workers=1),
        qc=replace(base.qc, max_cells_per_sample=100 if quick else base.qc.max_cells_per_sample),
        train=replace(base.train, max_steps=4 if quick else 40, checkpoint_steps=4 if quick else 20),
        classify=replace(base.classify, epochs=1, splits=("random",), models=("finetune", "probe", "knn", "hvg_logreg", "majority")),
        perturb=replace(base.perturb, max_cells=10 if quick else 30, max_genes=10 if quick else 60, num_permutations=100),
        compare=replace(base.compare, controls=("majority", "pca_knn"), models=("knn",), cells=200 if quick else 2_000),
        tune=replace(base.tune, space=({"objective.contrast_weight": (0.0,)},), seeds=1, splits=("random",), finetune=False),
    )  # fmt: skip


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """The share of the checks in the CPU time of every stage."""
    repeats = 1 if quick else 3
    page_seconds = _page_seconds(64 << 20)
    yield Figure(figure="checksums of Parquet pages", value=page_seconds * (1 << 30), unit="CPU s per GiB")
    with tempfile.TemporaryDirectory() as folder:
        made = _config(folder, quick=quick)
        for name, stage in STAGES.items():
            shares, took = [], []
            for number in range(repeats + 1):  # the first round is a warm-up, and makes what the next stage reads
                config = made
                if number:
                    inputs = Inputs() if name == "prepare" else Inputs(
                        corpus=f"{folder}/corpus", checkpoint=f"{folder}/pretrain", embeddings=f"{folder}/embed"
                    )  # fmt: skip
                    config = replace(config, output=f"{folder}/{name}-{number}", inputs=inputs)
                with _clocked() as clock:
                    start = time.process_time()
                    stage.run(config, executor=LocalExecutor())
                    took.append(time.process_time() - start)
                shares.append(100 * (clock.seconds + clock.parquet_bytes * page_seconds) / took[-1])
            figure = f"{name}: checks, of {statistics.median(took[1:]):.1f} CPU s; largest {max(shares[1:]):.2f} %"
            yield Figure(figure=figure, value=statistics.median(shares[1:]), unit="% of the stage", bar="3")
