"""Neighbours of cells, for the contrast of a cell with a cell like it (`objective.view=neighbour`).

A data set is the cells of one source and species. Its neighbours are sought within a shard of the corpus, so that a training
reads them where it reads the cell, and shards are independent. Cells are rows of gene weights (`encoder.bert.rank_weight`) of length
1, over the genes whose weights vary most, reduced to principal components. Neighbours are the nearest cells by cosine, found by
comparing all pairs (scikit-learn).

Shapes: N cells of a data set in a shard, C cells of the corpus, G genes, K neighbours, B cells of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from mixgf import rng
from mixgf.corpus.packed import I32, I64, token_positions
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import rank_weight
from mixgf.storage import artifacts, files, tables

KIND, SCHEMA = "neighbours", 1
READ_GENES = 2048
"""First genes of a sentence that are read."""
VARIABLE_GENES = 4000
COMPONENTS = 50
CELLS_PER_NEIGHBOUR = 40
"""A data set has one neighbour per cell for so many cells, up to `objective.neighbours`."""
SETTINGS = {
    "genes": READ_GENES, "variable_genes": VARIABLE_GENES, "components": COMPONENTS, "cells_per_neighbour": CELLS_PER_NEIGHBOUR,
}  # fmt: skip
"""What decides neighbours, beside their number and the corpus."""
_DRAW = 0x4E454947
_CACHED_SHARDS = 16


def part_uri(uri: str, shard: int) -> str:
    """URI of the neighbours of one shard."""
    return files.join(uri, "shards", f"{shard:05d}.parquet")


def find_in_shard(corpus_uri: str, shard: int, number: int, part: str) -> None:
    """Write the neighbours of the cells of a shard.

    The table has a row per cell: `group` (source and species), and `neighbours` (int32, rows of the shard, the nearest first; -1
    = no further one).
    """
    corpus = Corpus(corpus_uri, max_len=READ_GENES, cached_shards=1)
    cells = np.arange(corpus.starts[shard], corpus.starts[shard + 1])
    source = corpus.table(shard, ["source"])["source"].to_pylist()
    group = np.array(
        [f"{name} ({corpus.species[code]})" for name, code in zip(source, corpus.species_N[cells], strict=True)]
    )
    found = np.full((len(cells), number), -1, dtype=np.int32)
    for name in np.unique(group).tolist():
        rows = np.flatnonzero(group == name)
        few = nearest(components(*corpus.tokens(cells[rows]), corpus.vocabulary.size), number)
        found[rows, : few.shape[1]] = rows[few]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), number)
    tables.write_table(part, pa.table({"group": pa.array(group).dictionary_encode(), "neighbours": lists}))


def components(tokens_T: I32, offsets: I64, vocab_size: int) -> npt.NDArray[np.float32]:
    """Principal components of packed sentences, (N, at most `COMPONENTS`)."""
    weights_T = rank_weight(token_positions(offsets)).astype(np.float32)
    rows_NV = sparse.csr_matrix((weights_T, tokens_T, offsets), shape=(len(offsets) - 1, vocab_size))
    lengths_N = np.sqrt(np.asarray(rows_NV.multiply(rows_NV).sum(1)).ravel())
    rows_NV = sparse.csr_matrix(sparse.diags(1 / np.maximum(lengths_N, 1e-9)) @ rows_NV)
    mean_V = np.asarray(rows_NV.mean(0)).ravel()
    variance_V = np.asarray(rows_NV.multiply(rows_NV).mean(0)).ravel() - mean_V**2
    chosen = np.sort(np.argsort(-variance_V, kind="stable")[:VARIABLE_GENES])
    values_NG = rows_NV[:, chosen].toarray().astype(np.float32)
    number = min(COMPONENTS, *values_NG.shape)
    if len(values_NG) < 2:
        return np.zeros((len(values_NG), 1), dtype=np.float32)
    from sklearn.decomposition import PCA  # noqa: PLC0415 (not needed to train)

    return PCA(number, svd_solver="randomized", random_state=0).fit_transform(values_NG)


def nearest(values_ND: npt.NDArray[np.float32], number: int) -> I32:
    """The nearest other rows of each row by cosine, the nearest first, (N, K).

    K is `number`, or fewer: one per `CELLS_PER_NEIGHBOUR` rows, at least one where there are two rows.
    """
    num = len(values_ND)
    few = min(number, max(1, num // CELLS_PER_NEIGHBOUR), num - 1)
    if few < 1:
        return np.empty((num, 0), dtype=np.int32)
    lengths_N = np.linalg.norm(values_ND, axis=1, keepdims=True)
    unit_ND = values_ND / np.maximum(lengths_N, 1e-9)
    from sklearn.neighbors import NearestNeighbors  # noqa: PLC0415 (not needed to train)

    index = NearestNeighbors(n_neighbors=few + 1, algorithm="brute").fit(unit_ND)
    found = index.kneighbors(unit_ND, return_distance=False)
    other = found != np.arange(num)[:, None]
    other[other.all(1), -1] = False  # more equal cells than neighbours: the cell itself is not among them
    return found[other].reshape(num, few).astype(np.int32)


def groups_of(parts: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """The data set of each cell, as an index (`group`, int32) into the returned names."""
    codes, numbers = dict[str, int](), []
    for part in parts:
        names = tables.read_table(part, ["group"])["group"].to_pylist()
        numbers.append(np.array([codes.setdefault(name, len(codes)) for name in names], dtype=np.int32))
    return pa.table({"group": np.concatenate(numbers)}), list(codes)


class Neighbours:
    """The neighbours of the cells of a corpus, read shard by shard.

    Args:
        uri: of the artifact.
        corpus: the corpus that it was made from.
        allowed_C: bool, cells that may be drawn; None = all.
    """

    def __init__(self, uri: str, corpus: Corpus, allowed_C: npt.NDArray[np.bool_] | None = None) -> None:
        self.record = artifacts.require(uri, KIND, SCHEMA)
        self.uri, self._starts, self._allowed_C = uri, corpus.starts, allowed_C
        self.groups_C: I32 = tables.read_table(files.join(uri, "groups.parquet"))["group"].to_numpy()
        self._shard = functools.lru_cache(maxsize=_CACHED_SHARDS)(self._read_shard)

    def draw(self, cells_B: I64, keys_B: Any) -> I64:
        """One neighbour of each cell, drawn by a hash of the cell's key; a cell without neighbours is its own.

        Args:
            cells_B: cells of the corpus.
            keys_B: uint64, `rng.hashed(seed, epoch, visit)`.
        """
        out_B = cells_B.copy()
        draw_B = rng.uniform(_DRAW, after=keys_B)
        shard_B = np.searchsorted(self._starts, cells_B, side="right") - 1
        for shard in np.unique(shard_B).tolist():
            mine = np.flatnonzero(shard_B == shard)
            start = self._starts[shard]
            found = self._shard(shard)[cells_B[mine] - start].astype(np.int64)
            ok = found >= 0
            if self._allowed_C is not None:
                ok &= self._allowed_C[np.maximum(found, 0) + start]
            number = ok.sum(1)
            place = (draw_B[mine] * number).astype(np.int64)
            column = np.argmax(np.cumsum(ok, 1) > place[:, None], axis=1)  # the place-th allowed one
            chosen = found[np.arange(len(mine)), column] + start
            out_B[mine] = np.where(number > 0, chosen, cells_B[mine])
        return out_B

    def _read_shard(self, shard: int) -> I32:
        column = tables.read_table(part_uri(self.uri, shard), ["neighbours"])["neighbours"].combine_chunks()
        lists = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        read: I32 = lists.values.to_numpy().reshape(-1, lists.type.list_size)
        return read
