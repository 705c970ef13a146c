"""What a training needs before it begins: gene vectors (`model.start=svd`) and neighbours of cells (`objective.view=neighbour`).

Cells are random sentences with the lengths of real ones, in shards of 10,000 cells. One shard is drawn; the others are the same
file under other names. Both are made with one and with two Ray workers, whose files must be equal. CPU seconds are those of the
process and its workers; memory is the most that one of them held.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
from measure import Figure
from random_corpus import random_corpus

from mixgf.config import recipes
from mixgf.config.run import Compute, Config, Inputs
from mixgf.config.training import Model
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.session import session
from mixgf.stages import pretrain_inputs
from mixgf.storage import files, tables

SHARD_CELLS = 10_000
GENES = 20_000


def _corpus(folder: str, *, cells: int, shards: int) -> Corpus:
    """A corpus of equal shards."""
    random_corpus(folder, num_cells=cells, genes=GENES)
    first = Path(folder) / "shards" / "00000.parquet"
    table = tables.read_table(str(first))
    tables.write_table(str(first), table.append_column("source", pa.array(["source"] * cells)))
    for shard in range(1, shards):
        shutil.copy(first, first.with_name(f"{shard:05d}.parquet"))
    index = tables.read_table(files.join(folder, "index.parquet"))
    tables.write_table(files.join(folder, "index.parquet"), pa.concat_tables([index] * shards))
    where = Path(folder) / "record.json"
    record = json.loads(where.read_text())
    record["details"]["shards"] = [{"name": f"{shard:05d}.parquet", "rows": cells} for shard in range(shards)]
    where.write_text(json.dumps(record))
    return Corpus(folder)


class Usage:
    """CPU seconds and memory of this process and all that it started, as they are when asked for."""

    def __init__(self) -> None:
        self.peak, self.began = 0.0, time.perf_counter()
        self.before = self.cpu()

    def _all(self) -> list[psutil.Process]:
        me = psutil.Process()
        return [me, *me.children(recursive=True)]

    def cpu(self) -> float:
        """CPU seconds so far of this process and the workers that still run."""
        total = 0.0
        for process in self._all():
            try:
                times = process.cpu_times()
                if "ray::" in " ".join(process.cmdline()) or process.pid == psutil.Process().pid:
                    total += times.user + times.system
                    self.peak = max(self.peak, process.memory_info().rss / 1e9)
            except psutil.Error:
                continue
        return total

    def spent(self) -> tuple[float, float, float]:
        """CPU seconds, wall seconds, GB."""
        return self.cpu() - self.before, time.perf_counter() - self.began, self.peak


def figures(*, quick: bool) -> Iterator[Figure]:
    """All figures."""
    cells, shards = (500, 2) if quick else (SHARD_CELLS, 6)
    with tempfile.TemporaryDirectory() as folder:
        corpus = _corpus(f"{folder}/corpus", cells=cells, shards=shards)
        made: dict[str, list[bytes]] = {"gene vectors": [], "neighbours": []}
        for workers in (1, 2):
            config = _config(f"{folder}/{workers}", corpus.uri, workers)
            executor = RayExecutor(config)
            with session(config):
                for name, make in (
                    ("gene vectors", pretrain_inputs.make_gene_vectors),
                    ("neighbours", pretrain_inputs.make_neighbours),
                ):
                    usage = Usage()
                    uri = make(config, corpus, executor)
                    cpu, wall, peak = usage.spent()
                    made[name].append(_bytes(uri))
                    what = f"{name}, {cells * shards:,} cells, {workers} Ray workers"
                    yield Figure(figure=f"{what}: CPU", value=cpu / (cells * shards) * 1e3, unit="ms / cell")
                    yield Figure(figure=f"{what}: wall time", value=wall, unit="s")
                    yield Figure(figure=f"{what}: largest process at the end", value=peak, unit="GB")
        for name, (one, two) in made.items():
            yield Figure(
                figure=f"{name}: files of 1 and 2 workers are equal", value=float(one == two), unit="1 = yes", bar="1"
            )


def _config(output: str, corpus: str, workers: int) -> Config:
    base = recipes.laptop()
    return replace(
        base, output=output, model=Model(num_layers=0, dim=128, max_positions=2048, start="svd"),
        inputs=Inputs(corpus=corpus), compute=Compute(num_workers=workers),
    )  # fmt: skip


def _bytes(uri: str) -> bytes:
    if uri.endswith(".parquet"):
        return files.read_bytes(uri)
    names = sorted(files.list_dir(files.join(uri, "shards")))
    return b"".join(files.read_bytes(files.join(uri, "shards", name)) for name in names)
