"""`bench.py prepare`: cells per second of every step, beside the published way, the least possible work and a plain process pool.

Cells are the bundled human pancreas cells, thinned anew at every repetition (binomially, seeded), in .h5ad files written
as anndata writes them: gzip-compressed, and raw. CPU seconds of this process, one thread, unless "wall" is said.

"Published way" is the algorithm of the published tokenizers, written plainly here. It reads a backed AnnData, 512 cells at a
time by an index array, and sorts each cell by itself. It keeps all cells as Python lists until the end. Then it makes one
table, which two further passes cut and measure.
"Floor" is the work that every algorithm has: decompress the file's chunks (libdeflate), sort one 64-bit key per gene
(numpy), and write the tokens as Parquet.
"Whole" figures are of `prepare` from sources to corpus in a fresh process without Ray, its functions compiled before. Bytes read of the
source are those that the process asks the system for (local; all but those of its own output) or the store for (S3: moto's server on
loopback, slowed to 100 MB/s).

MIXGF_BENCH_AGAINST=FOLDER measures the code of another checkout in turn, as the baseline of the whole figures: for an older commit,
`git worktree add /tmp/older COMMIT && MIXGF_BENCH_AGAINST=/tmp/older python jobs/bench.py prepare`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import anndata
import deflate
import h5py
import numpy as np
import psutil
import pyarrow as pa
import scipy.sparse as sp
from measure import Figure, interleaved, rate, s3_server

from mixgf.cells.counts import read_blocks
from mixgf.cells.open import open_reader
from mixgf.config import recipes
from mixgf.config.data import HUMAN, QC, Source, Tokens
from mixgf.config.parse import override
from mixgf.config.run import Config
from mixgf.corpus import prepare_passes, shards, source_genes
from mixgf.corpus.rank_value import Encoder, Ranks
from mixgf.distributed import session
from mixgf.distributed.executor import RayExecutor
from mixgf.execution import LocalExecutor, Task, attempt
from mixgf.genes.vocabulary import Vocabulary
from mixgf.stages import prepare
from mixgf.storage import files, tables

NUM_CELLS = 12_000
NUM_PUBLISHED = 2_000
"""Cells that the published way is given: it takes a fixed time per cell."""
NUM_WHOLE, NUM_SMALL = 20_000, 500
NUM_SCALE = 300_000
TOKENS = Tokens()
NODE_CORES = 16
NODE_BYTES_PER_SECOND = 1.25e9
"""Of the projection: 10 Gbit/s between a node and object storage."""


def write_cells(path: Path, num_cells: int, *, gzip: bool) -> None:
    """One .h5ad of so many cells, written block by block."""
    cells = anndata.read_h5ad(files.local_path("resource:pancreas_human_baron.h5ad"))
    counts = cells.X.tocsr().astype(np.float32)
    options: dict[str, Any] = {"compression": "gzip" if gzip else None, "maxshape": (None,)}
    options["chunks"] = (h5py.filters.guess_chunk((num_cells * counts.nnz // cells.n_obs,), None, 4)[0],)
    anndata.AnnData(X=counts[:0], var=cells.var).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        x = file["X"]
        del x["data"], x["indices"], x["indptr"]
        for name, kind in (("data", np.float32), ("indices", np.int32)):
            x.create_dataset(name, (0,), kind, **options)
        lengths = []
        for k, start in enumerate(range(0, num_cells, cells.n_obs)):
            block = counts[: min(cells.n_obs, num_cells - start)].copy()
            rng = np.random.default_rng(k)
            block.data = rng.binomial(block.data.astype(np.int64), rng.uniform(0.8, 1.0)).astype(np.float32)
            block.eliminate_zeros()
            lengths.append(np.diff(block.indptr))
            for name in ("data", "indices"):
                old = x[name].shape[0]
                x[name].resize((old + block.nnz,))
                x[name][old:] = getattr(block, name)
        x["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        x.attrs["shape"] = (num_cells, counts.shape[1])
        del file["obs"]
        file.create_group("obs").attrs.update(
            {"_index": "_index", "column-order": np.array([], h5py.string_dtype()), "encoding-type": "dataframe", "encoding-version": "0.2.0"}
        )  # fmt: skip
        names = np.array([f"c{i}" for i in range(num_cells)], dtype=object)
        file["obs"].create_dataset("_index", data=names, dtype=h5py.string_dtype())
        file["obs/_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def published(path: Path, medians: dict[str, float], ids: dict[str, int], depth_N: np.ndarray, to: Path) -> int:
    """The published tokenizers' algorithm, plainly, over the first `NUM_PUBLISHED` cells."""
    cells = anndata.read_h5ad(path, backed="r")
    genes = cells.var["ensembl_id"].to_numpy()
    known = np.flatnonzero([gene in medians for gene in genes])
    norm = np.array([medians[gene] for gene in genes[known]])
    tokens = np.array([ids[gene] for gene in genes[known]])
    sentences: list[np.ndarray] = []
    passing = np.arange(min(NUM_PUBLISHED, cells.n_obs))
    for start in range(0, len(passing), 512):
        chosen = passing[start : start + 512]
        block = cells[chosen, known].X
        scaled = sp.csr_matrix(block / depth_N[chosen][:, None] * 10_000 / norm)
        for i in range(scaled.shape[0]):
            row = scaled[i]
            sentences.append(tokens[row.indices[np.argsort(-row.data)]])
    table = pa.table({"input_ids": pa.array([s.tolist() for s in sentences], pa.list_(pa.int32()))})
    cut = [row.as_py()[: TOKENS.max_len] for row in table["input_ids"]]
    table = pa.table({"input_ids": pa.array(cut, pa.list_(pa.int32()))})
    lengths = [len(row.as_py()) for row in table["input_ids"]]
    table = table.append_column("length", pa.array(lengths))
    with pa.OSFile(str(to), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    cells.file.close()
    return len(lengths)


def _config(path: Path, output: Path, **prepare_: Any) -> Config:
    # the cells are repetitions of a few: rules that look for outliers and duplicates would have odd things to do
    rules = [
        "qc.drop_duplicates=false",
        "qc.method=none",
        "qc.doublets=off",
        "qc.near_duplicates=off",
        *(f"prepare.{k}={v}" for k, v in prepare_.items()),
    ]
    plain = override(recipes.get("default"), [f"output={output}", *rules])
    return replace(plain, sources=(Source(uri=str(path), species="human", name="cells"),))


class _Case:
    """One file, prepared once, so that each part can be timed alone."""

    def __init__(self, folder: Path, num_cells: int, *, gzip: bool) -> None:
        self.name = "gzip .h5ad" if gzip else "raw .h5ad"
        self.folder = folder / self.name.split()[0]
        self.folder.mkdir()
        self.path = self.folder / "cells.h5ad"
        write_cells(self.path, num_cells, gzip=gzip)
        self.num_cells, self.gzip = num_cells, gzip
        self.config = _config(self.path, self.folder / "run", shard_cells=num_cells)
        self.rows = self.config.prepare.block_cells
        prepare.run(self.config, executor=LocalExecutor())
        self.corpus = self.folder / "run" / "corpus"
        vocabulary = Vocabulary.load(str(self.corpus))
        self.digest, genes = vocabulary.hash, vocabulary.species_genes("human")
        self.medians = dict(zip(genes.genes, genes.medians.tolist(), strict=True))
        self.ids = dict(zip(genes.genes, genes.tokens.tolist(), strict=True))
        self.work = str(self.folder / "work")
        source = self.config.sources[0]
        prepare_passes.describe_source(
            self.work, 0, source, row=HUMAN, rules=QC(), biotypes=self.config.vocab.biotypes, allowed=None
        )
        source_genes.collect_genes(self.work, "human", 0, [0])
        source_genes.merge_genes(self.work, "human", [0])
        self.unit = prepare_passes.plan_row_ranges({0: (source, num_cells)}, num_cells)[0]
        self.keep = np.ones(num_cells, dtype=bool)
        self.measure()
        self.drop_copy()
        self.depth_N = prepare_passes.read_metrics(self.work, [0])[0].n_counts
        self.columns = tables.read_table(shards.part_uri(self.work, "sources", 0))
        own = self.columns["canonical"].to_numpy() == np.arange(self.columns.num_rows)
        position_G = np.where(own, genes.positions(self.columns["gene"].combine_chunks()), -1).astype(np.int32)
        self.encoder = Encoder(Ranks.of(genes, "divide"), position_G, TOKENS)
        self.table = tables.read_table(str(self.corpus / "shards" / "00000.parquet"))
        self.held = []
        for block in self.blocks():
            self.held.append(replace(block, data=block.data.copy(), indices=block.indices.copy()))
            if len(self.held) == 3:
                break
        self.num_held = sum(len(b.indptr) - 1 for b in self.held)
        rng = np.random.default_rng(0)
        self.keys = [
            rng.integers(0, 1 << 62, stop - start).astype(np.uint64)
            for b in self.held
            for start, stop in zip(b.indptr[:-1], b.indptr[1:], strict=True)
        ]

    def raw_read(self) -> None:
        """The floor of reading: the file's bytes, decompressed chunk by chunk."""
        with h5py.File(self.path) as file:
            for name in ("data", "indices"):
                column = file[f"X/{name}"]
                rows = column.chunks[0]
                for start in range(0, column.shape[0], rows):
                    data = column.id.read_direct_chunk((start,))[1]
                    if self.gzip:
                        deflate.zlib_decompress(data, rows * 4)

    def blocks(self) -> Iterator[Any]:
        """Checked count blocks, as every pass reads them."""
        with open_reader(str(self.path)) as reader:
            yield from read_blocks(reader, self.columns, 0, self.num_cells, rows=self.rows)

    def sort(self) -> None:
        """The floor of ranking."""
        for keys in self.keys:
            np.sort(keys)

    def encode(self) -> None:
        """Rank value encoding of the held blocks."""
        for b in self.held:
            self.encoder(b.data, b.indices, b.indptr)

    def measure(self) -> None:
        """The first pass, with its copy of the counts."""
        self.drop_copy()
        prepare_passes.measure_cells(
            prepare_passes.MetricsPlan(work=self.work, row_range=self.unit, block_cells=self.rows, keep_counts=True)
        )

    def drop_copy(self) -> None:
        """Remove the copy of the counts, so that passes read the source."""
        shutil.rmtree(f"{self.work}/counts-00000", ignore_errors=True)

    def sentences_of_the_file(self) -> None:
        """The third pass, file to file."""
        self.drop_copy()
        self.sentences()

    def sketch(self, share: float = 1.0) -> None:
        """The second pass, over a random share of the cells."""
        drawn = self.keep & (np.random.default_rng(0).random(len(self.keep)) < share)
        prepare_passes.sketch_medians(
            prepare_passes.SketchPlan(
                work=self.work, number=0, parts=[(self.unit, drawn)], block_cells=self.rows, sampled=share < 1
            )
        )

    def sentences(self) -> None:
        """The third pass: from the copy if it is there, else file to file, as the published tokenizer does, with medians given."""
        plan = prepare_passes.ShardPlan(
            work=self.work, row_range=self.unit, keep_N=self.keep, shard=0, to=str(self.folder / "out"), tokens=TOKENS,
            obs={}, digest=self.digest, vocabulary=str(self.corpus / "vocabulary.parquet"), block_cells=self.rows,
        )  # fmt: skip
        prepare_passes.encode_shard(plan)

    def write(self) -> None:
        """Write a shard."""
        shards.write_shard(str(self.folder / "w.parquet"), self.table.schema, [self.table])

    def figures(self, *, repeats: int) -> Iterator[Figure]:
        """All figures of this file."""
        n, n_published = self.num_cells, min(NUM_PUBLISHED, self.num_cells)
        to = self.folder / "published.arrow"
        works: dict[str, Callable[[], object]] = {
            "sentences": self.sentences_of_the_file,
            "published": lambda: published(self.path, self.medians, self.ids, self.depth_N, to),
            "read": self.raw_read,
            "sort": self.sort,
            "write": self.write,
            "encode": self.encode,
            "checked": lambda: sum(len(b.indptr) for b in self.blocks()),
            "measure": self.measure,
            "sketch": self.sketch,
            "sketch of a tenth": lambda: self.sketch(0.1),
            "from copy": self.sentences,
        }
        cells = dict.fromkeys(works, n) | {"published": n_published, "sort": self.num_held, "encode": self.num_held}
        times = interleaved(works, repeats=repeats, cpu=True)
        each = {k: [t / cells[k] for t in v] for k, v in times.items()}  # seconds per cell
        unit = "cells/CPU-s"

        def one(name: str, key: str, against: str = "") -> Figure:
            return rate(f"{self.name}: {name}", unit, 1, times=each, key=key, against=against)

        yield one("file to Parquet sentences, against the published way", "sentences", "published")
        yield one("read and check counts, against bare decompression", "checked", "read")
        yield one("encode in memory, against a bare sort", "encode", "sort")
        yield one("write Parquet", "write")
        yield one("pass 1, metrics and copy (reads the source)", "measure")
        yield one("pass 2, median sketch (reads the copy)", "sketch")
        yield one("pass 2 from a tenth of the cells (vocab.median_cells), against all", "sketch of a tenth", "sketch")
        yield one("pass 3, sentences (reads the copy)", "from copy")
        floors = [r + s + w for r, s, w in zip(each["read"], each["sort"], each["write"], strict=True)]
        shares = [f / ours for f, ours in zip(floors, each["sentences"], strict=True)]
        yield Figure(
            figure=f"{self.name}: file to sentences, share of the floor", value=1 / statistics.median(each["sentences"]), unit=unit,
            baseline=1 / statistics.median(floors), ratio=statistics.median(shares), bar="0.9" if self.gzip else "0.93",
        )  # fmt: skip
        whole = sum(statistics.median(each[k]) for k in ("measure", "sketch", "from copy"))
        yield Figure(figure=f"{self.name}: all three passes", value=1 / whole, unit=unit)


_WHOLE = """
import io, json, os, resource, sys, threading, time
from dataclasses import replace
from mixgf.config import recipes
from mixgf.config.data import QC, Source
from mixgf.config.parse import override
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import files, s3, tables

uri, small, output, rate, near = *sys.argv[1:4], float(sys.argv[4]), sys.argv[5]
found = dict(requests=0, bytes=0, wait=0.0, copy=0, parts=0)
range_reader, remove = files.range_reader, files.remove

lock, free = threading.Lock(), [0.0]

def counting(uri, etag):
    fetch = range_reader(uri, etag)
    def fetch_slowly(start, stop):
        with lock:  # all requests together get `rate`
            found["requests"] += 1
            found["bytes"] += stop - start
            free[0] = max(free[0], time.perf_counter()) + (stop - start) / rate
            until = free[0]
        data = fetch(start, stop)
        time.sleep(max(0.0, until - time.perf_counter()))
        return data
    return fetch_slowly

def waiting(function):
    def wait(self, start, stop):
        began = time.perf_counter()
        data = function(self, start, stop)
        found["wait"] += time.perf_counter() - began
        return data
    return wait

class PartFile(io.FileIO):
    def readinto(self, room):
        number = super().readinto(room)
        found["parts"] += number or 0
        return number

    def readall(self):
        data = super().readall()
        found["parts"] += len(data)
        return data

def open_part(uri, *options):
    if not files.is_local(uri) or not str(uri).startswith(output):
        return open_read(uri, *options)
    return io.BufferedReader(PartFile(files.local_path(uri)))

open_read = files.open_read
files.open_read = tables.open_read = open_part

def count_copy(work):
    for folder, _, names in os.walk(work):
        if "/counts-" in folder:
            found["copy"] += sum(os.path.getsize(os.path.join(folder, n)) for n in names)

def removing_own(uri, kind, **options):
    count_copy(uri + "/work")
    remove_own(uri, kind, **options)

def removing(uri):
    if uri.endswith("/work"):
        count_copy(uri)
    remove(uri)

try:
    from mixgf.storage import layout
    remove_own, layout.remove_own = layout.remove_own, removing_own
except ImportError:  # older code removes the folder as a whole
    files.remove = removing
files.range_reader, s3.RangeFile._bytes = counting, waiting(s3.RangeFile._bytes)
if hasattr(s3, "ReadAhead"):
    s3.ReadAhead.read = waiting(s3.ReadAhead.read)

def run(uri, name, *more):
    rules = [*more, "qc.drop_duplicates=false", "qc.method=none", "tracking.uri=off"]
    if isinstance(QC().doublets, str):  # older code looks for doublets only where it is asked to
        rules.append("qc.doublets=off")
    if hasattr(QC(), "near_duplicates"):
        rules.append("qc.near_duplicates=" + near)
    config = override(recipes.get("default"), [f"output={output}/{name}", *rules])
    prepare.run(replace(config, sources=(Source(uri=uri, species="human", name="cells"),)), executor=LocalExecutor())

def all_read():
    return int(open("/proc/self/io").read().split()[1])

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

run(small, "compile", "prepare.shard_cells=250")  # two parts, so that the merge of sketches is loaded, too
before = cpu()
run(small, "small")
fixed = cpu() - before
found.update(requests=0, bytes=0, wait=0.0, copy=0, parts=0)
before, read, began = cpu(), all_read(), time.perf_counter()
run(uri, "run")
found["wall"] = time.perf_counter() - began
found["cpu"] = cpu() - before - fixed
found["local"] = all_read() - read - found["parts"]
found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps(found))
"""
"""Runs `prepare` by the code of any checkout: small file, then the measured one."""


def whole(tree: str, uri: str, small: str, folder: Path, *, near: str = "off") -> dict[str, float]:
    """What one `prepare` costs: CPU seconds, wall seconds, bytes read, requests, seconds of waiting, bytes of the copy, peak memory.

    Args:
        tree: checkout whose code runs.
        uri: the source.
        small: a source of `NUM_SMALL` cells, whose cost is subtracted.
        folder: for the output.
        near: `qc.near_duplicates`, where the code has it.
    """
    output = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-c", _WHOLE, uri, small, output, "1e8", near]
    settings = os.environ | {"PYTHONPATH": tree}
    done = subprocess.run(command, env=settings, cwd=tree, capture_output=True, text=True, check=False)
    shutil.rmtree(output)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _whole_figure(  # noqa: PLR0917
    place: str, found: dict[str, list[dict[str, float]]], what: str, unit: str, key: str, per: float, bar: str = ""
) -> Figure:
    """Median of one of `whole`'s numbers, divided by `per`; the ratio is the other checkout's number by ours."""
    values = {name: [run[key] / per for run in runs] for name, runs in found.items()}
    name, mine = f"whole, {place}: {what}", statistics.median(values["ours"])
    if "theirs" not in values:
        return Figure(figure=name, value=mine, unit=unit, bar=bar)
    ratio = statistics.median(b / a if a else 0.0 for a, b in zip(values["ours"], values["theirs"], strict=True))
    return Figure(
        figure=name, value=mine, unit=unit, baseline=statistics.median(values["theirs"]), ratio=ratio, bar=bar
    )


def whole_figures(folder: Path, num_cells: int, *, repeats: int) -> Iterator[Figure]:
    """All of `prepare` in one process, beside another checkout's (`MIXGF_BENCH_AGAINST`), from disk and from S3."""
    trees = {"ours": str(Path(__file__).parent.parent)}
    if other := os.environ.get("MIXGF_BENCH_AGAINST"):
        trees["theirs"] = other
    small = folder / "small.h5ad"
    write_cells(small, NUM_SMALL, gzip=True)
    for place in ("gzip", "raw", "S3 gzip"):
        path = folder / f"whole-{place.split()[-1]}.h5ad"
        if not path.exists():
            write_cells(path, num_cells, gzip="gzip" in place)
        size = path.stat().st_size
        with s3_server() if place.startswith("S3") else nullcontext("") as bucket:
            uri, first = (f"{bucket}/cells.h5ad", f"{bucket}/small.h5ad") if bucket else (str(path), str(small))
            if bucket:
                files.upload(path, uri)
                files.upload(small, first)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            searched: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": found["ours"]}
            for _ in range(repeats):
                for name, tree in trees.items():
                    found[name].append(whole(tree, uri, first, folder))
                if place == "gzip":
                    searched["ours"].append(whole(trees["ours"], uri, first, folder, near="flag"))

        one = partial(_whole_figure, place, found)
        more = num_cells - NUM_SMALL
        yield one(f"CPU per cell beyond the first {NUM_SMALL}", "us", "cpu", 1e-6 * more, "1.7x")
        if place == "gzip":
            what = "CPU per cell with the search for near duplicates, against none"
            yield _whole_figure(place, searched, what, "us", "cpu", 1e-6 * more)
        if bucket:
            yield one("bytes read of the source, per byte", "", "bytes", size, "1.3")
            yield one("requests per 10,000 cells", "", "requests", num_cells / 1e4)
            for run in (run for runs in found.values() for run in runs):
                run["share"] = run["wait"] / run["wall"]
            yield one("share of the time waiting for storage", "", "share", 1.0)
        else:
            yield one("bytes read of the source, per byte", "", "local", size, "1.3")
            yield one("bytes read of the copy and of other parts, per byte of the source", "", "parts", size)
        yield one("peak disk of the copy, per byte of the source", "", "copy", size)
        yield one("peak memory of the process", "GB", "peak", 1.0)


class _Watch:
    """Largest memory of any one worker below this process while it is open, in GB: resident (`peak`), and without shared pages (`own`)."""

    def __enter__(self) -> Self:
        self.peak, self.own, self._open = 0.0, 0.0, True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while self._open:
            for process in psutil.Process().children(recursive=True):
                try:
                    name = " ".join(process.cmdline()[:1])
                    if name.startswith(("ray::attempt", "ray::Read")) or "spawn_main" in " ".join(process.cmdline()):
                        used = process.memory_full_info()
                        self.peak, self.own = max(self.peak, used.rss / 1e9), max(self.own, used.uss / 1e9)
                except psutil.Error:
                    continue
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()


def scale(folder: Path, num_cells: int, *, repeats: int) -> Iterator[Figure]:
    """One large file: the whole of prepare on Ray, memory of its workers, and the third pass against a plain pool."""
    path = folder / "large.h5ad"
    write_cells(path, num_cells, gzip=True)
    config = _config(path, folder / "large")
    workers = config.compute.num_workers
    with session.session(config), _Watch() as watched:
        start = time.perf_counter()
        uri = prepare.run(config)
        whole = time.perf_counter() - start
        yield Figure(
            figure=f"prepare of {num_cells:,} cells on {workers} Ray workers (wall)",
            value=num_cells / whole,
            unit="cells/s",
        )
        yield Figure(
            figure="memory of the largest worker, same run",
            value=watched.peak,
            unit="GB",
            bar="0.5",
        )
        yield Figure(
            figure="memory that no other process shares, of the largest worker, same run", value=watched.own, unit="GB"
        )
        work = str(folder / "work")
        source = config.sources[0]
        prepare_passes.describe_source(
            work, 0, source, row=HUMAN, rules=QC(), biotypes=config.vocab.biotypes, allowed=None
        )
        all_units = prepare_passes.plan_row_ranges({0: (source, num_cells)}, config.prepare.shard_cells)
        executor = RayExecutor(config)
        block_cells = config.prepare.block_cells
        measures = [
            Task(
                part="", function=prepare_passes.measure_cells, weight=u.stop - u.start,
                args=(prepare_passes.MetricsPlan(work=work, row_range=u, block_cells=block_cells, keep_counts=False),),
            )
            for u in all_units
        ]  # fmt: skip
        assert not any(receipt.error for receipt in executor.run(measures))
        options: dict[str, Any] = {
            "tokens": TOKENS, "obs": {}, "digest": Vocabulary.load(uri).hash, "vocabulary": f"{uri}/vocabulary.parquet",
            "block_cells": config.prepare.block_cells, "to": str(folder / "shards"), "work": work,
        }  # fmt: skip
        plans = [
            prepare_passes.ShardPlan(row_range=u, keep_N=np.ones(u.stop - u.start, bool), shard=u.number, **options)
            for u in all_units
        ]
        encodes = [
            Task(part="", function=prepare_passes.encode_shard, weight=len(plan.keep_N), args=(plan,)) for plan in plans
        ]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            works: dict[str, Callable[[], object]] = {
                "ray": lambda: list(executor.run(encodes)),
                "pool": lambda: pool.starmap(attempt, enumerate(encodes), chunksize=1),
            }
            times = interleaved(works, repeats=repeats)
    ratio = statistics.median(r / p for r, p in zip(times["ray"], times["pool"], strict=True))
    yield Figure(
        figure=f"sentences of {num_cells:,} cells, Ray Data: wall time against a plain pool (bar: 1.2)",
        value=statistics.median(times["ray"]), unit="s", baseline=statistics.median(times["pool"]), ratio=ratio,
    )  # fmt: skip
    bytes_per_cell = path.stat().st_size / num_cells
    for nodes in (8, 32):
        compute = 50e6 * workers / (num_cells / whole) / (nodes * NODE_CORES)
        network = 50e6 * bytes_per_cell * 4 / (nodes * NODE_BYTES_PER_SECOND)
        yield Figure(
            figure=f"projection: 50 M cells like these on {nodes} nodes of {NODE_CORES} such cores and 10 Gbit/s (baseline: network alone)",
            value=max(compute, network) / 60, unit="minutes", baseline=network / 60,
        )  # fmt: skip


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """All figures of the stage."""
    repeats = 1 if quick else 3
    with tempfile.TemporaryDirectory() as name:
        for gzip in (True, False):
            yield from _Case(Path(name), 1500 if quick else NUM_CELLS, gzip=gzip).figures(repeats=repeats)
        yield from whole_figures(Path(name), 2_000 if quick else NUM_WHOLE, repeats=repeats)
        yield from scale(Path(name), 12_000 if quick else NUM_SCALE, repeats=repeats)
