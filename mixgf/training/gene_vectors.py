"""Vectors of genes before training: singular vectors of the sentences of a corpus, or a table that the user brings.

Cells are rows of gene weights (`encoder.bert.rank_weight`) of length 1. By species, each gene is divided by its standard deviation,
or by the median one where that is larger. A gene's vector has its entries in the right singular vectors, times the root of the
singular values, and length 1. The first singular vector, which is near the mean cell, is left out. Species are turned onto the
first one by an orthogonal map of one-to-one orthologs (Procrustes); genes that share an id get the mean of their vectors.

The singular vectors are found by subspace iteration (Halko et al. 2011): each pass over the sentences multiplies a basis by the
matrix of second moments. A part of a pass holds the sums of some shards, which the corpus alone decides; parts are added in order.
So the bytes do not depend on the number of workers. Memory of a worker: four arrays of genes x (dimensions + 17).

Shapes: V vocabulary, G genes of a species, K columns of the basis, D width, N cells, T packed tokens.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import torch
from scipy import linalg

from mixgf.corpus.packed import I32, I64
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import rank_weight
from mixgf.encoder.checkpoint import read_tensors, write_tensors
from mixgf.errors import UserError
from mixgf.execution import Pipeline
from mixgf.genes.vocabulary import NUM_SPECIALS, Vocabulary
from mixgf.jit import jit
from mixgf.storage import files, tables

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

KIND, SCHEMA = "gene_vectors", 1
TABLE = "vectors.parquet"
"""The artifact's table (`table_of`)."""
PASSES = 5
"""Passes of the subspace iteration, after one pass for means and deviations."""
MORE_COLUMNS = 16
"""Columns of the basis beyond the singular vectors that are kept."""
READ_GENES = 2048
"""First genes of a sentence that are read."""
MOST_PARTS = 64
"""Parts of a pass."""
_BLOCK_CELLS = 512
"""Cells whose sum is in single precision."""
_TABLE_CELLS = 2048
_SEED = 0x53564453


@dataclass(frozen=True, kw_only=True, slots=True)
class SumPlan:
    """One part of a pass."""

    corpus: str
    """URI of the corpus."""
    shards: tuple[int, ...]
    state: str
    """URI of the basis by which the second moments are multiplied; empty = the pass for means and deviations."""
    part: str
    """URI of the part file."""


def plan_parts(corpus: Corpus) -> list[tuple[int, ...]]:
    """The shards of each part: at most `MOST_PARTS` runs of shards, which depend on the corpus alone."""
    parts = np.array_split(np.arange(len(corpus.shards)), min(MOST_PARTS, len(corpus.shards)))
    return [tuple(part.tolist()) for part in parts]


def read_sentences(plan: SumPlan) -> Iterator[pa.Table]:
    """Read: tables of sentences (`tokens`) and species codes (`code`)."""
    corpus = Corpus(plan.corpus, cached_shards=1)
    for shard in plan.shards:
        start, stop = int(corpus.starts[shard]), int(corpus.starts[shard + 1])
        tokens = corpus.table(shard, ["tokens"]).column("tokens").combine_chunks()
        whole = pa.table([tokens, pa.array(corpus.species_N[start:stop])], names=["tokens", "code"])
        for first in range(0, stop - start, _TABLE_CELLS):
            yield whole.slice(first, _TABLE_CELLS)


class Columns:
    """The genes of each species of a vocabulary, as columns of its sums.

    Args:
        vocabulary: of the corpus.
        species: names by species code.
    """

    def __init__(self, vocabulary: Vocabulary, species: Sequence[str]) -> None:
        self.tokens = [vocabulary.species_tokens(name) for name in species]
        self.column_PV = np.full((len(species), vocabulary.size), -1, dtype=np.int32)
        for p, tokens in enumerate(self.tokens):
            self.column_PV[p, tokens] = np.arange(len(tokens))


def write_sums(rows: Iterator[pa.Table], plan: SumPlan) -> None:
    """Write: the sums of a part.

    | tensor | what it is |
    |---|---|
    | cells.P | number of cells of species P |
    | sum.P, squares.P | sums of weights and of their squares, float64 (G,); in the first pass |
    | product.P | second moments times the basis, float64 (G, K); in the other passes |
    """
    corpus = Corpus(plan.corpus, cached_shards=1)
    columns = Columns(corpus.vocabulary, corpus.species)
    weight_L = rank_weight(np.arange(READ_GENES, dtype=np.float64)).astype(np.float32)
    state = read_tensors(plan.state) if plan.state else {}
    sums = [_Sums(len(tokens), _basis(state, p)) for p, tokens in enumerate(columns.tokens)]
    for table in rows:
        tokens_T, offsets, codes = _packed(table)
        for p in np.unique(codes).tolist():
            sums[p].add(tokens_T, offsets, np.flatnonzero(codes == p), columns.column_PV[p], weight_L)
    write_tensors(
        plan.part, {f"{k}.{p}": torch.from_numpy(v) for p, s in enumerate(sums) for k, v in s.finish().items()}
    )


def _basis(state: Mapping[str, torch.Tensor], p: int) -> F32 | None:
    return np.ascontiguousarray(state[f"basis.{p}"].numpy()) if state else None


def _packed(table: pa.Table) -> tuple[I32, I64, npt.NDArray[np.int8]]:
    column = table["tokens"].combine_chunks()
    lists = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy().astype(np.int32, copy=False)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0], table["code"].to_numpy()


class _Sums:
    """Sums over the cells of one species, in the order of the corpus; blocks of cells do not depend on how tables are cut."""

    def __init__(self, num_genes: int, basis_GK: F32 | None) -> None:
        self.cells = 0
        self.basis_GK = basis_GK
        self.sum_G, self.squares_G = np.zeros(num_genes), np.zeros(num_genes)
        self.block_GK = np.zeros_like(basis_GK) if basis_GK is not None else np.zeros((0, 0), np.float32)
        self.product_GK = self.block_GK.astype(np.float64)

    def add(self, tokens_T: I32, offsets: I64, cells: I64, column_V: I32, weight_L: F32) -> None:
        if self.basis_GK is None:
            _add_moments(tokens_T, offsets, cells, column_V, weight_L, self.sum_G, self.squares_G)
            self.cells += len(cells)
            return
        while len(cells):
            few = cells[: _BLOCK_CELLS - self.cells % _BLOCK_CELLS]
            _add_products(tokens_T, offsets, few, column_V, weight_L, self.basis_GK, self.block_GK)
            self.cells += len(few)
            cells = cells[len(few) :]
            if self.cells % _BLOCK_CELLS == 0:
                self._end_block()

    def _end_block(self) -> None:
        self.product_GK += self.block_GK
        self.block_GK[:] = 0

    def finish(self) -> dict[str, npt.NDArray[np.float64]]:
        number = np.array([self.cells], dtype=np.float64)
        if self.basis_GK is None:
            return {"cells": number, "sum": self.sum_G, "squares": self.squares_G}
        self._end_block()
        return {"cells": number, "product": self.product_GK}


@jit
def _add_moments(  # noqa: PLR0917 (compiled)
    tokens_T: I32, offsets: I64, cells: I64, column_V: I32, weight_L: F32, sum_G: F64, squares_G: F64
) -> None:
    for cell in cells:
        start, stop = offsets[cell], min(offsets[cell + 1], offsets[cell] + len(weight_L))
        square = 0.0
        for t in range(start, stop):
            if column_V[tokens_T[t]] >= 0:
                square += float(weight_L[t - start]) ** 2
        for t in range(start, stop):
            g = column_V[tokens_T[t]]
            if g >= 0:
                weight = float(weight_L[t - start])
                sum_G[g] += weight / np.sqrt(square)
                squares_G[g] += weight * weight / square


@jit
def _add_products(  # noqa: PLR0917 (compiled)
    tokens_T: I32, offsets: I64, cells: I64, column_V: I32, weight_L: F32, basis_GK: F32, out_GK: F32
) -> None:
    """Add x (x B) of each cell's row x, for the basis B."""
    num = basis_GK.shape[1]
    y = np.empty(num, dtype=np.float32)
    for cell in cells:
        start, stop = offsets[cell], min(offsets[cell + 1], offsets[cell] + len(weight_L))
        square = np.float32(0.0)
        y[:] = 0
        for t in range(start, stop):
            g = column_V[tokens_T[t]]
            if g >= 0:
                weight, row = weight_L[t - start], basis_GK[g]
                square += weight * weight
                for k in range(num):
                    y[k] += weight * row[k]
        if square > 0:
            for k in range(num):
                y[k] /= square
        for t in range(start, stop):
            g = column_V[tokens_T[t]]
            if g >= 0:
                weight, out = weight_L[t - start], out_GK[g]
                for k in range(num):
                    out[k] += weight * y[k]


sum_sentences = Pipeline(name="sum_sentences", source="Sentences", read=read_sentences, write=write_sums)
"""One part of a pass over the sentences. Takes a `SumPlan`."""


# Between two passes: one process


def _added(parts: Sequence[str]) -> dict[str, F64]:
    """The sums of all parts, added in order."""
    total: dict[str, F64] = {}
    for part in parts:
        for name, tensor in read_tensors(part).items():
            total[name] = total[name] + tensor.numpy() if name in total else tensor.numpy()
    return total


def first_state(parts: Sequence[str], uri: str, *, dim: int) -> None:
    """Write the state after the first pass: scales of the genes, and a random basis.

    A state holds, for species P: `scale.P` (reciprocal deviation, float64 (G,)), `values.P` (K,), `vectors.P` (orthonormal, float64
    (G, K)), and `basis.P`, the float32 product of both, by which the next pass multiplies.
    """
    total = _added(parts)
    state: dict[str, npt.NDArray[Any]] = {}
    for p in range(len(total) // 3):  # each species has cells, sum and squares
        number = total[f"cells.{p}"][0]
        mean_G, square_G = (total[f"{name}.{p}"] / max(number, 1) for name in ("sum", "squares"))
        sd_G = np.sqrt(np.maximum(square_G - mean_G**2, 0))
        seen_G = total[f"sum.{p}"] > 0
        median = np.median(sd_G[seen_G]) if seen_G.any() else 1.0
        scale_G = np.where(seen_G, 1 / np.maximum(np.maximum(sd_G, median), 1e-12), 0.0)
        width = int(min(dim + 1 + MORE_COLUMNS, seen_G.sum(), number))
        random_GK = np.random.default_rng([_SEED, p]).standard_normal((len(sd_G), width)) * seen_G[:, None]
        vectors_GK = np.linalg.qr(random_GK)[0]
        state |= _state(p, scale_G, np.ones(width), vectors_GK)
    write_tensors(uri, {name: torch.from_numpy(value) for name, value in state.items()})


def next_state(parts: Sequence[str], before: str, uri: str) -> None:
    """Write the state after a pass of products: left singular vectors of the product, and their singular values."""
    total, old = _added(parts), read_tensors(before)
    state: dict[str, npt.NDArray[Any]] = {}
    for p in range(len(total) // 2):  # each species has cells and product
        scale_G = old[f"scale.{p}"].numpy()
        vectors_GK, values_K, _ = np.linalg.svd(total[f"product.{p}"] * scale_G[:, None], full_matrices=False)
        top = np.abs(vectors_GK).argmax(0) if len(vectors_GK) else np.empty(0, np.int64)
        vectors_GK = vectors_GK * np.sign(vectors_GK[top, np.arange(vectors_GK.shape[1])])
        state |= _state(p, scale_G, values_K, vectors_GK)
    write_tensors(uri, {name: torch.from_numpy(value) for name, value in state.items()})


def _state(p: int, scale_G: F64, values_K: F64, vectors_GK: F64) -> dict[str, npt.NDArray[np.floating]]:
    basis_GK = np.ascontiguousarray(vectors_GK * scale_G[:, None], dtype=np.float32)
    return {f"scale.{p}": scale_G, f"values.{p}": values_K, f"vectors.{p}": vectors_GK, f"basis.{p}": basis_GK}


def species_vectors(state: str, *, dim: int) -> list[F64]:
    """Gene vectors of each species (G, D), of length 1, or 0 for genes in no sentence; columns that the corpus cannot fill are 0."""
    found = read_tensors(state)
    out = []
    for p in range(len(found) // 4):  # each species has four tensors, as `first_state` says
        values_K, vectors_GK = found[f"values.{p}"].numpy(), found[f"vectors.{p}"].numpy()
        kept_GD = (vectors_GK * values_K**0.25)[:, 1 : dim + 1]  # values are squares of singular values
        out.append(np.pad(_unit(kept_GD), ((0, 0), (0, dim - kept_GD.shape[1]))))
    return out


def _unit(rows: F64) -> F64:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-9)


def align_species(
    vectors: Sequence[F64],
    vocabulary: Vocabulary,
    species: Sequence[str],
    orthologs: Mapping[tuple[str, str], Mapping[str, str]],
) -> tuple[F32, dict[str, int]]:
    """One vector per token id, (V, D), and by species the number of ortholog pairs that turned it onto the first species.

    Species with fewer pairs than dimensions are not turned.
    """
    dim = vectors[0].shape[1]
    sums_VD, counts_V = np.zeros((vocabulary.size, dim)), np.zeros(vocabulary.size)
    pairs: dict[str, int] = {}
    columns = Columns(vocabulary, species)
    for p, name in enumerate(species):
        own_GD = vectors[p]
        if p:
            partner_V = vocabulary.ortholog_map(name, species[0], orthologs)
            ids = columns.tokens[p]
            there_G = np.where(columns.column_PV[0, ids] >= 0, ids, partner_V[ids])  # a shared id is its own partner
            first_GD = np.where((there_G >= 0)[:, None], vectors[0][columns.column_PV[0, np.maximum(there_G, 0)]], 0.0)
            both_G = (there_G >= 0) & own_GD.any(1) & first_GD.any(1)
            pairs[name] = int(both_G.sum())
            if pairs[name] >= dim:
                own_GD = own_GD @ linalg.orthogonal_procrustes(own_GD[both_G], first_GD[both_G])[0]
        there = own_GD.any(1)
        sums_VD[columns.tokens[p][there]] += own_GD[there]
        counts_V[columns.tokens[p][there]] += 1
    return _unit(sums_VD / np.maximum(counts_V, 1)[:, None]).astype(np.float32), pairs


def table_of(tokens_VD: F32, vocabulary: Vocabulary) -> pa.Table:
    """Vectors as a table with a row per gene: gene, species, symbol, vector."""
    rows = tokens_VD[vocabulary.table["token"].to_numpy()]
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    return vocabulary.table.select(["gene", "species", "symbol"]).append_column("vector", column)


# Tables that users bring


def read_vectors(uri: str) -> tuple[list[str], F64]:
    """Genes and their vectors of a table; `inputs.gene_vectors` says in which forms.

    Raises:
        UserError: the table is not there, has no column of genes, or a vector is not of finite numbers.
    """
    where = f"inputs.gene_vectors = {uri!r}"
    if not uri or not files.exists(uri):
        msg = (
            f"{where}: no such file; model.start = 'table' needs a Parquet or CSV table with a column gene and vectors"
        )
        raise UserError(msg)
    table = tables.read_table(uri) if uri.endswith(".parquet") else pa_csv.read_csv(io.BytesIO(files.read_bytes(uri)))
    key = next((name for name in ("gene", "ensembl_id") if name in table.column_names), None)
    if key is None:
        msg = f"{where}: has columns {', '.join(table.column_names[:5])}; must have gene (Ensembl ids)"
        raise UserError(msg)
    genes = [re.sub(r"\.\d+$", "", str(gene)) for gene in table[key].to_pylist()]
    if "vector" in table.column_names:
        values = _rows_of(table["vector"])
    else:
        numbers = [f.name for f in table.schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
        values = np.stack([table[n].to_numpy().astype(np.float64) for n in numbers], 1) if numbers else np.empty((0, 0))
    if not values.size or not np.isfinite(values).all():
        msg = f"{where}: vectors must be finite numbers, and all of one length"
        raise UserError(msg)
    return genes, values


def _rows_of(column: pa.ChunkedArray) -> F64:
    """Lists of one length as rows; no rows if they are not."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return np.empty((0, 0))
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(widths) != 1 or not widths[0] or column.null_count:
        return np.empty((0, 0))
    return pc.list_flatten(column).to_numpy().astype(np.float64).reshape(-1, widths[0])


def start_tokens(
    uri: str, vocabulary: Vocabulary, *, dim: int, orthologs: Mapping[tuple[str, str], Mapping[str, str]]
) -> tuple[F32, dict[str, int]]:
    """Token vectors from a table of gene vectors, (V, D), and how many genes have their own, their ortholog's, or none.

    Vectors longer than `model.dim` are projected on their first principal components. All have length 1. A gene that the table
    lacks takes the vector of a one-to-one ortholog, else it has a vector of zeros. A shared id takes the mean of its genes.

    Raises:
        UserError: the table cannot be used, its vectors are shorter than `model.dim`, or it has none of the genes.
    """
    genes, values = read_vectors(uri)
    if values.shape[1] < dim:
        msg = f"inputs.gene_vectors = {uri!r}: vectors of {values.shape[1]} numbers; set model.dim to at most that"
        raise UserError(msg)
    if values.shape[1] > dim:
        centred = values - values.mean(0)
        values = centred @ np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :dim]
    rows = dict(zip(genes, _unit(values), strict=True))
    sums_VD, counts_V = np.zeros((vocabulary.size, dim)), np.zeros(vocabulary.size)
    counts = {"own": 0, "ortholog": 0, "none": 0}
    columns = (vocabulary.table[name].to_pylist() for name in ("token", "gene", "species"))
    for token, gene, name in zip(*columns, strict=True):
        partners = (pairs.get(gene, "") for (a, _), pairs in orthologs.items() if a == name)
        row = rows.get(gene)
        kind = "own" if row is not None else "ortholog"
        row = row if row is not None else next((rows[p] for p in partners if p in rows), None)
        counts[kind if row is not None else "none"] += 1
        if row is not None:
            sums_VD[token] += row
            counts_V[token] += 1
    if not counts_V.any():
        msg = f"inputs.gene_vectors = {uri!r}: none of the genes of the vocabulary; give Ensembl ids, without version"
        raise UserError(msg)
    tokens_VD = _unit(sums_VD / np.maximum(counts_V, 1)[:, None])
    tokens_VD[:NUM_SPECIALS] = 0
    return tokens_VD.astype(np.float32), counts
