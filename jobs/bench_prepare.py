"""`bench.py prepare`: cells per second of reading, QC, encoding and writing, beside the published way and the physical floor.

Cells are the bundled human pancreas cells, repeated to `NUM_CELLS` rows of one .h5ad, gzip-compressed as scanpy writes it.
"Published way" is the per-cell algorithm of the published tokenizers, written plainly here: backed AnnData in blocks of 512
cells, one numpy argsort per cell, tokens kept as Python lists until the end, then one table, cut and measured in further
passes. CPU seconds of this process, one thread.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from measure import Figure, interleaved, peak_memory, rate

from mixgf import recipes, storage, tokenize, units
from mixgf.config import HUMAN, QC, Config, Source, Tokens, override
from mixgf.corpus import blocks
from mixgf.drivers import prepare
from mixgf.formats import open_reader
from mixgf.vocab import SpeciesGenes, Vocabulary

NUM_CELLS = 12_000
TOKENS = Tokens()


def _repeated(path: Path, num_cells: int) -> None:
    """One .h5ad of so many cells."""
    cells = anndata.read_h5ad(storage.local_path("resource:pancreas_human_baron.h5ad"))
    counts = cells.X.tocsr().astype(np.float32)
    times = -(-num_cells // cells.n_obs)
    stacked = sp.vstack([counts] * times, format="csr")[:num_cells]
    anndata.AnnData(X=stacked, var=cells.var).write_h5ad(path, compression="gzip")


def published(path: Path, medians: dict[str, float], ids: dict[str, int], to: Path) -> int:
    """The published tokenizers' algorithm, plainly."""
    cells = anndata.read_h5ad(path, backed="r")
    genes = cells.var["ensembl_id"].to_numpy()
    known = np.flatnonzero([gene in medians for gene in genes])
    norm = np.array([medians[gene] for gene in genes[known]])
    tokens = np.array([ids[gene] for gene in genes[known]])
    sentences: list[list[int]] = []
    for start in range(0, cells.n_obs, 512):
        block = cells[start : start + 512].X
        depth = np.asarray(block.sum(axis=1)).ravel()
        scaled = (
            sp.csr_matrix(block[:, known].multiply(1 / depth[:, None]) * 10_000).multiply(1 / norm[None, :]).tocsr()
        )
        for i in range(scaled.shape[0]):
            row = scaled[i]
            sentences.append(tokens[row.indices[np.argsort(-row.data)]].tolist())
    table = pa.table({"input_ids": pa.array(sentences, pa.list_(pa.int32()))})
    cut = [row.as_py()[: TOKENS.max_len] for row in table["input_ids"]]
    pq.write_table(pa.table({"input_ids": pa.array(cut, pa.list_(pa.int32())), "length": [len(c) for c in cut]}), to)
    cells.file.close()
    return len(cut)


class _Case:
    """One file, described and measured once, so that each part can be timed alone."""

    def __init__(self, folder: Path, num_cells: int) -> None:
        self.path = folder / "cells.h5ad"
        _repeated(self.path, num_cells)
        self.num_cells, self.folder = num_cells, folder
        source = Source(uri=str(self.path), species="human", name="cells")
        rules = ["qc.drop_duplicates=false", "qc.method=none"]
        plain = override(recipes.get("default"), [f"output={folder / 'run'}", *rules])
        self.config: Config = replace(plain, sources=(source,))
        prepare.run(self.config, spread=prepare.loop)
        self.vocabulary = Vocabulary.load(str(folder / "run" / "corpus"))
        self.genes: SpeciesGenes = self.vocabulary.of("human")
        self.work = str(folder / "work")
        units.describe(self.work, 0, source, row=HUMAN, rules=QC(), biotypes=self.config.vocab.biotypes, allowed=None)
        units.number_genes(self.work, "human", [0])
        self.unit = units.plan_units({0: (source, num_cells)}, num_cells)[0]
        self.keep = np.ones(num_cells, dtype=bool)
        self.columns = storage.read_table(units.part(self.work, "sources", 0))
        gene = self.columns["gene"].to_pylist()
        canonical = self.columns["canonical"].to_pylist()
        self.position_G = self.genes.positions(
            g if int(c) == i else None for i, (g, c) in enumerate(zip(gene, canonical, strict=True))
        )
        self.table = storage.read_table(str(folder / "run" / "corpus" / "shards" / "00000.parquet"))

    def raw_read(self) -> None:
        """The floor of reading: the file's bytes, decompressed."""
        with h5py.File(self.path) as file:
            for name in ("data", "indices"):
                column = file[f"X/{name}"]
                for start in range(0, column.shape[0], 1 << 21):
                    column[start : start + (1 << 21)]

    def blocks(self) -> Iterator[Any]:
        """Checked count blocks, as every pass reads them."""
        with open_reader(str(self.path)) as reader:
            yield from blocks(reader, self.columns, 0, self.num_cells, rows=self.config.prepare.block_cells)

    def sort(self) -> None:
        """The floor of ranking: one sort of as many 64-bit keys as the cell has genes."""
        for b in self.held:
            for a, c in zip(b.indptr[:-1], b.indptr[1:], strict=True):
                np.sort(b.data[a:c].astype(np.uint64))

    def hold(self) -> None:
        """Keep the first blocks in memory, for the parts that do not read."""
        self.held = []
        for block in self.blocks():
            self.held.append(block)
            if len(self.held) == 4:
                break
        self.num_held = sum(len(b.indptr) - 1 for b in self.held)

    def encode(self) -> None:
        """Rank value encoding of the held blocks."""
        for b in self.held:
            tokenize.encode(b.data, b.indices, b.indptr, position_G=self.position_G, genes=self.genes, tokens=TOKENS)

    def ours(self) -> None:
        """Read, encode, write: the third pass, which is what the published tokenizer does with medians given."""
        units.encode(
            self.work, self.unit, self.keep, 0, to=str(self.folder / "out"), tokens=TOKENS, obs={},
            vocabulary=str(self.folder / "run" / "corpus" / "vocabulary.parquet"), block_cells=self.config.prepare.block_cells,
        )  # fmt: skip


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """All figures of the stage."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = _Case(folder, 1500 if quick else NUM_CELLS)
        repeats = 1 if quick else 3
        medians = dict(zip(case.genes.genes, case.genes.medians.tolist(), strict=True))
        ids = dict(zip(case.genes.genes, case.genes.tokens.tolist(), strict=True))
        units.measure(case.work, case.unit, case.config.prepare.block_cells)
        case.hold()
        whole: dict[str, Callable[[], object]] = {
            "ours": case.ours,
            "published": lambda: published(case.path, medians, ids, folder / "published.parquet"),
            "read": case.raw_read,
            "checked": lambda: sum(len(b.indptr) for b in case.blocks()),
            "measure": lambda: units.measure(case.work, case.unit, case.config.prepare.block_cells),
            "sketch": lambda: units.sketch(case.work, case.unit, case.keep, case.config.prepare.block_cells),
        }
        t = interleaved(whole, repeats=repeats, cpu=True)
        held: dict[str, Callable[[], object]] = {
            "encode": case.encode,
            "sort": case.sort,
            "write": lambda: units.write_shard(str(folder / "w.parquet"), case.table),
        }
        h = interleaved(held, repeats=repeats, cpu=True)
    n, unit = case.num_cells, "cells/CPU-s"
    yield rate("gzip .h5ad -> Parquet sentences, against published", unit, n, times=t, key="ours", against="published")
    yield rate("read and check blocks, against raw decompression", unit, n, times=t, key="checked", against="read")
    yield rate("pass 1, metrics", unit, n, times=t, key="measure")
    yield rate("pass 2, median sketch", unit, n, times=t, key="sketch")
    yield rate("encode in memory, against a bare sort", unit, case.num_held, times=h, key="encode", against="sort")
    yield rate("write Parquet", unit, case.table.num_rows, times=h, key="write")
    floor = 1 / (
        statistics.median(t["read"]) / n
        + statistics.median(h["sort"]) / case.num_held
        + statistics.median(h["write"]) / case.table.num_rows
    )
    ours = n / statistics.median(t["ours"])
    yield Figure(
        figure="share of the floor (read + sort + write)",
        value=ours / floor,
        unit="share",
        baseline=1.0,
        ratio=ours / floor,
    )
    yield Figure(figure="peak memory of this process", value=peak_memory(), unit="GB")
