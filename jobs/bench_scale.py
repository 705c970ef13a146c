"""What the process that runs `prepare` needs for 50 million cells: `bench.py scale`.

Sources of 10,000 cells each are invented: no counts, but the parts that the first pass writes (metrics, hashes with 1 %
duplicates, ten donors per source, gene columns and their sums). The real stage goes on from them: gene reports, quality
control, duplicates, caps, vocabulary, plans of shards, index and record. It is stopped after half of the shards and started
again. Near duplicates are off: tasks look for them (`bench.py duplicates`). Its other tasks run in two processes, whose time
is not counted. Sketches are invented, and a shard is written without sentences: its footer, and the lengths of its cells. Then
the finished corpus is opened.

From object storage (moto's server on loopback), sources have few cells and few genes, and only the restart is measured, up to its
first shard: requests, as the server counts them, time, and CPU seconds of this process and of the server.

Every size is measured in a process of its own. CPU seconds are those of the process that runs the stage, with all its
threads; memory is the most that the step held.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from measure import Figure, s3_server

from mixgf.cells import qc
from mixgf.config import recipes
from mixgf.config.data import HUMAN, MOUSE, QC, Source
from mixgf.config.run import Config, Tracking
from mixgf.corpus import prepare_passes, shards
from mixgf.corpus.reader import Corpus
from mixgf.execution import LocalExecutor, Receipt, Receipts, Task, attempt
from mixgf.genes import identify, medians, species
from mixgf.stages import prepare
from mixgf.storage import files, s3, tables

CELLS = 10_000
"""Of a source."""
SIZES = (500, 5_000)
"""Numbers of sources."""
REMOTE_SIZES, REMOTE_CELLS, FEW_GENES = (1_000, 5_000), 20, 500
"""Numbers of sources in object storage, and cells and genes of each."""
STEPS = ("_describe", "_measure", "_reports", "_filter_cells", "_vocabulary", "_encode", "_publish")
GENES_OF_A_SKETCH = 20
"""Filled buckets of a gene in an invented sketch."""


# invented parts


def config(folder: Path | str, num_sources: int, cells: int) -> Config:
    """The config of the invented corpus: default settings, and caps per donor."""
    names = [f"source{i:05d}" for i in range(num_sources)]
    sources = tuple(
        Source(uri=f"{folder}/cells/{n}.h5ad", species=("human", "mouse")[i % 2], name=n, sample="donor")
        for i, n in enumerate(names)
    )
    return replace(
        recipes.get("default"), output=f"{folder}/run", sources=sources, tracking=Tracking(uri="off"),
        qc=QC(doublets="off", near_duplicates="off", max_cells_per_sample=max(1, cells // 11)),
    )  # fmt: skip


def _columns(work: str, of: Config, most: int | None = None) -> dict[str, str]:
    """Gene columns of a file with all (or `most`) genes of a species, and a tenth of unknown names; URIs by species."""
    found = {}
    for row in (HUMAN, MOUSE):
        genes = species.gene_table(row)["gene"].to_pylist()[:most]
        names = [f"unknown{i}" if i % 10 == 0 else gene for i, gene in enumerate(genes)]
        columns = identify.identify_columns(names, identify.gene_lookup(row), biotypes=of.vocab.biotypes)
        found[row.name] = f"{work}/columns-{row.name}.parquet"
        tables.write_table(found[row.name], columns)
    return found


def _invent_source(work: str, index: int, source: Source, *, cells: int, columns: str) -> None:
    """The parts that describe and measure one source; `columns` is the URI of its gene columns."""
    rng, num_columns = np.random.default_rng(index), pq.read_metadata(columns).num_rows
    files.write_bytes(source.uri, b"-")
    kinds = {"cell_type": "str", "donor": "str"}
    facts = {"rows": cells, "columns": num_columns, "obs": {k: k for k in kinds}, "kinds": kinds, "by_column": False,
             "notes": [], "size": 1}  # fmt: skip
    files.write_json(shards.facts_uri(work, index), facts)
    files.copy(columns, shards.part_uri(work, "sources", index))
    sums = rng.poisson(200, num_columns) * (rng.random(num_columns) < 0.7)
    sums[::10] //= 20  # of the unknown names
    tables.write_table(shards.part_uri(work, "sums", index), pa.table({"sum": sums}))
    depth = rng.lognormal(8.5, 0.5, cells).astype(np.int64) + 20
    halves = [rng.integers(0, 1 << 64, cells, dtype=np.uint64) for _ in range(2)]
    copies = rng.random(cells) < 0.01
    common = np.random.default_rng(0).integers(0, 1 << 64, (2, 1_000), dtype=np.uint64)
    chosen = rng.integers(0, 1_000, copies.sum())
    for half, of in zip(halves, common, strict=True):
        half[copies] = of[chosen]
    found = qc.Metrics(
        depth, np.minimum(depth // 3 + 7, 8_000).astype(np.int32), rng.binomial(depth, rng.beta(2, 30, cells)), *halves
    )
    donors = pa.array(np.sort(rng.integers(0, 10, cells)).astype(str))
    measured = {name: getattr(found, name) for name in qc.Metrics.__slots__}
    tables.write_table(shards.part_uri(work, "metrics", index), pa.table(measured | {"sample": donors}))


def _call(work: Callable[[], None]) -> None:
    work()


def _invent_sketch(part: str, cells: int, plan: prepare_passes.SketchPlan) -> None:
    rng = np.random.default_rng(cells)
    listed = tables.read_table(shards.part_uri(plan.work, "genes", plan.parts[0][0].source.species))
    genes = np.arange(min(18_000, listed.num_rows), dtype=np.uint32)[:, None] * medians.NUM_BUCKETS
    buckets = 5_000 + np.sort(rng.choice(900, GENES_OF_A_SKETCH, replace=False)).astype(np.uint32)
    keys = (genes + buckets).ravel().astype(np.uint32)
    prepare_passes.write_sketch(part, medians.Sketch(keys, rng.integers(1, 50, len(keys)).astype(np.uint32)))


def _invent_shard(plan: prepare_passes.ShardPlan) -> None:
    """Information on a shard, and its file without sentences."""
    metrics, _ = prepare_passes.read_metrics(plan.work, [plan.row_range.number])
    lengths = np.minimum(metrics.n_genes[plan.keep_N], plan.tokens.max_len).astype(np.int32)
    name = shards.shard_name(plan.shard)
    size, digest = shards.write_shard(f"{plan.to}/{name}", plan.schema, [plan.schema.empty_table()])
    entry = {"name": name, "rows": len(lengths), "bytes": size, "sha256": digest}
    shards.write_shard_info(plan.work, plan.shard, lengths, entry)


def _work(numbered: tuple[int, Task]) -> Receipt:
    number, task = numbered
    kind = task.part.rsplit("/", 2)[-2]
    if kind == "sketch":
        _invent_sketch(task.part, int(task.weight), task.args[0])
        return Receipt(number)
    if kind == "done":
        _invent_shard(task.args[0])
        return Receipt(number)
    return attempt(number, task)


class _Stopped(Exception):
    """The first run ends here."""


class _Processes(LocalExecutor):
    """Runs tasks in two processes; stops after so many shards."""

    def __init__(self, pool: Any, *, most_shards: int = 1 << 40) -> None:
        self.processes, self.most_shards = pool, most_shards

    def run(self, tasks: Sequence[Task]) -> Receipts:
        for receipt in self.processes.imap_unordered(_work, enumerate(tasks), chunksize=8):
            if tasks[receipt.number].part.rsplit("/", 2)[-2] == "done":
                if self.most_shards == 0:
                    raise _Stopped
                self.most_shards -= 1
            yield receipt


class _Nothing(LocalExecutor):
    """Stops at the first task."""

    def run(self, tasks: Sequence[Task]) -> Receipts:
        assert tasks[0].part.rsplit("/", 2)[-2] == "done", f"{tasks[0].part} is made again"
        raise _Stopped
        yield Receipt(0)  # a generator


# measuring


class _Steps:
    """CPU seconds, wall seconds and peak memory of named steps."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the former peak
        cpu, wall, first = time.process_time(), time.perf_counter(), len(self.rows)
        try:
            yield
        finally:
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            )
            inner = [row["peak_gb"] for row in self.rows[first:]]
            self.rows.append({
                "step": name, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall,
                "peak_gb": max(int(status["VmHWM"].split()[0]) * 1024 / 1e9, *inner, 0.0),
            })  # fmt: skip

    def watch(self, owner: type, name: str, prefix: str) -> Callable[[], None]:
        """Measure every call of a method; returns what undoes that."""
        method = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.step(f"{prefix}: {name.lstrip('_').replace('_', ' ')}"):
                return method(*args, **kwargs)

        setattr(owner, name, measured)
        return partial(setattr, owner, name, method)


@contextmanager
def _listings() -> Iterator[Counter[str]]:
    """Counts calls of `files.list_dir` by the last name of the folder."""
    seen: Counter[str] = Counter()
    real = files.list_dir

    def counted(uri: str) -> list[str]:
        seen[uri.rsplit("/", 1)[-1]] += 1
        return real(uri)

    with mock.patch.object(files, "list_dir", counted):
        yield seen


def _prepare_twice(of: Config, pool: Any, steps: _Steps) -> str:
    num = len(of.sources)
    uri = ""
    for prefix, most in (("first run", num // 2), ("restart", 1 << 40)):
        undo = [steps.watch(prepare._Prepare, name, prefix) for name in STEPS]
        with _listings() as seen, steps.step(f"{prefix}: all"), suppress(_Stopped):
            uri = prepare.run(of, executor=_Processes(pool, most_shards=most))
        for each in undo:
            each()
        steps.rows[-1] |= {"listings": sum(seen.values()), "folders": len(seen)}
    return uri


def _read_back(uri: str, steps: _Steps) -> None:
    with steps.step("reader: open the corpus"):
        corpus = Corpus(uri)
    with steps.step("reader: columns of all shards"):
        assert "donor" in corpus.columns
    from mixgf.stages.embed import _name
    from mixgf.stages.fan_out import missing

    with steps.step("embed: plan"):
        tasks = [
            Task(part=f"{uri}/embed/{_name(i)}", function=print, weight=int(corpus.shard_rows[i]))
            for i in range(len(corpus.shards))
        ]
        assert len(missing(tasks)) == len(corpus.shards)


def _invent(of: Config, columns: dict[str, str], cells: int, pool: Any) -> None:
    work = f"{of.output}/corpus/work"
    pool.map(
        _call,
        [
            partial(_invent_source, work, i, s, cells=cells, columns=columns[s.species])
            for i, s in enumerate(of.sources)
        ],
        chunksize=8,
    )


def measure(num_sources: int, cells: int) -> list[dict[str, Any]]:
    """All steps at one size, in this process."""
    steps = _Steps()
    with tempfile.TemporaryDirectory() as name, multiprocessing.get_context("spawn").Pool(2) as pool:
        folder = Path(name)
        of = config(folder, num_sources, cells)
        (folder / "cells").mkdir()
        _invent(of, _columns(name, of), cells, pool)
        uri = _prepare_twice(of, pool, steps)
        _read_back(uri, steps)
    return steps.rows


def measure_remote(num_sources: int, cells: int) -> list[dict[str, Any]]:
    """The restart of a half-done corpus in object storage, up to its first shard."""
    steps = _Steps()
    with tempfile.TemporaryDirectory() as name, s3_server(log := Path(name, "log")) as bucket:
        of = config(f"{bucket}/scale", num_sources, cells)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            _invent(of, _columns(name, of, FEW_GENES), cells, pool)
            with suppress(_Stopped):
                prepare.run(of, executor=_Processes(pool, most_shards=num_sources // 2))
        s3.forget_connections()
        (server,) = (p for p in psutil.Process().children() if "moto.server" in p.cmdline())
        first, before = log.read_text().splitlines(), server.cpu_times()
        with suppress(_Stopped), steps.step("restart from S3, before its first shard"):
            prepare.run(of, executor=_Nothing())
        after, asked = server.cpu_times(), log.read_text().splitlines()[len(first) :]
        verbs = (re.search(r"(HEAD|GET|PUT|POST|DELETE) /(.*list-type=2)?", line) for line in asked)
        kinds = Counter("list" if verb[2] else verb[1] for verb in verbs if verb is not None)
        served = after.user + after.system - before.user - before.system
        steps.rows[-1] |= {"requests": sum(kinds.values()), "kinds": dict(kinds), "server_cpu_s": served}
    return steps.rows


def _measured(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """CPU, wall time and memory of every step at 5 and 50 million cells; restarts from S3 with 1,000 and 5,000 sources."""
    for num_sources in (10, 20) if quick else REMOTE_SIZES:
        (row,) = _measured(str(num_sources), str(REMOTE_CELLS), "s3")
        what = f"{num_sources:,} sources: {row['step']}"
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(row["kinds"].items()))
        bar = "60" if num_sources == REMOTE_SIZES[-1] else ""
        yield Figure(figure=f"{what}: wall", value=row["wall_s"], unit="s", bar=bar)
        yield Figure(figure=f"{what}: CPU of the driver", value=row["cpu_s"], unit="s")
        yield Figure(figure=f"{what}: CPU of the server (moto)", value=row["server_cpu_s"], unit="s")
        yield Figure(figure=f"{what}: requests ({kinds})", value=row["requests"], unit="requests")
    for num_sources in (10, 20) if quick else SIZES:
        cells = 200 if quick else CELLS
        million = f"{num_sources * cells / 1e6:g} M cells"
        large = num_sources == SIZES[-1]
        for row in _measured(str(num_sources), str(cells)):
            whole = large and row["step"].endswith(": all")
            what = f"{million}: {row['step']}"
            yield Figure(figure=f"{what}: CPU of the driver", value=row["cpu_s"], unit="s", bar="60" if whole else "")
            yield Figure(figure=f"{what}: wall", value=row["wall_s"], unit="s")
            yield Figure(figure=f"{what}: peak memory", value=row["peak_gb"], unit="GB", bar="4" if whole else "")
            if "listings" in row:
                yield Figure(
                    figure=f"{what}: listings of {row['folders']} folders", value=row["listings"], unit="listings"
                )


if __name__ == "__main__":
    run = measure_remote if sys.argv[3:] == ["s3"] else measure
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
