"""Cell sentences held in memory: from any reader of counts, block by block, without a corpus on disk.

A sentence here is the one that `mixgf prepare` writes for the same cell and vocabulary. Quality control is not applied:
every row is given, a cell without any gene of the vocabulary with an empty sentence (or `<cls>` alone).

Shapes: N cells, T packed tokens, G columns of the table of counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy import sparse

from mixgf.cells import counts, kinds, qc
from mixgf.cells.features import describe_unknown, identify_genes, name_column, require_cells
from mixgf.cells.reader import Reader, file_error
from mixgf.config.data import SpeciesRow, Tokens
from mixgf.config.parse import to_dict
from mixgf.console import say, warn
from mixgf.corpus import rank_value
from mixgf.corpus.packed import I32, I64, offsets_of
from mixgf.corpus.reader import Corpus
from mixgf.corpus.shards import name_obs, obs_array
from mixgf.errors import UserError
from mixgf.genes import identify
from mixgf.genes.vocabulary import SpeciesGenes, Vocabulary
from mixgf.storage import artifacts

FEW_GENES = 0.01
"""Share of the names of a file. A file with fewer genes of its species is refused, if most of its names are those of another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Genes:
    """What the columns of a table of counts are to a model: its species, and the genes of the vocabulary among them."""

    row: SpeciesRow
    columns: pa.Table
    """As `identify.identify_columns` gives it, one row per column of counts."""
    position_G: npt.NDArray[np.int32]
    """Place of each column in the species' genes; -1: not in the vocabulary, or added to an earlier column of its gene."""
    measured: npt.NDArray[np.int32]
    """Tokens of the vocabulary genes that the table measures, ascending."""
    of_species: SpeciesGenes
    """All genes of the species in the vocabulary."""
    notes: tuple[str, ...] = ()
    """What is to be said about the names, for the user."""


def find_genes(
    reader: Reader, vocabulary: Vocabulary, rows: tuple[SpeciesRow, ...], *, species: str = "", column: str = ""
) -> Genes:
    """Find out the species of a table of counts and which of its columns are genes of the vocabulary.

    Args:
        reader: Of the counts.
        vocabulary: Of the model.
        rows: The species that the model reads.
        species: Name of one of them; empty = the one that most gene names belong to.
        column: Column of var with Ensembl ids or symbols, as `Source.genes`.

    Raises:
        UserError: a species that the model does not read, or none of the genes is known to it.
    """
    rows = tuple(row for row in rows if row.name in vocabulary.species)
    asked = [row for row in rows if not species or row.name == species]
    if not asked:
        msg = f"{reader.uri}: species = {species!r}: the model reads {', '.join(row.name for row in rows)}"
        raise UserError(msg)
    require_cells(reader)
    names = reader.gene_names(column)
    found = [_genes_of(reader, row, vocabulary, names=names) for row in asked]
    best = max(found, key=_written)
    if not column and len(found) > 1 and best.columns["gene"].null_count > 0.5 * best.columns.num_rows:
        found = [_genes_of(reader, one.row, vocabulary, column=column, columns=one.columns) for one in found]
        best = max(found, key=_written)  # another column of var may say more
    else:
        best = _genes_of(reader, best.row, vocabulary, column=column, columns=best.columns)
    number = len(best.measured)
    if number < FEW_GENES * len(names):
        others = [identify.gene_lookup(row) for row in rows if row.name != best.row.name]
        if not number or identify.species_of([str(name) for name in names], others):
            told = describe_unknown(
                reader, best.columns, identify.gene_lookup(best.row), others, asked=bool(column),
                known="they are genes, but the model was trained without them",
            )  # fmt: skip
            raise file_error(
                reader.uri,
                f"{reader.num_rows} cells, {number or 'none'} of {len(names)} genes is known to the model; {told}",
            )
    return best


TOLD_CELLS, TOLD_BLOCK = 1_000, 250
"""Cells whose counts `tell` looks at, and those that it reads at a time."""


def tell(reader: Reader, genes: Genes, rows: Iterable[SpeciesRow]) -> None:
    """Print what is left out, renamed or doubted in a table of counts, as `mixgf prepare` does; of its first `TOLD_CELLS` cells.

    Args:
        reader: Of the counts.
        genes: As `find_genes` found them in it.
        rows: The species that the model reads.

    Raises:
        UserError: a value is no count.
    """
    num = min(reader.num_rows, TOLD_CELLS)
    lookup, others = partial(identify.gene_lookup, genes.row), (row for row in rows if row.name != genes.row.name)
    found = counts.read_blocks(reader, genes.columns, 0, num, rows=TOLD_BLOCK)
    metrics, sums_G = qc.measure_blocks(found, genes.columns)
    report = identify.report_mapping(
        genes.columns, sums_G, map(identify.gene_lookup, others), lookup, way=name_column(reader)
    )
    for text in genes.notes:
        warn(f"{reader.uri}: {text}")
    if told := report.describe(genes.row.name):
        (warn if report.cause else say)(f"{reader.uri}: {told}")
    for text in filter(None, (kinds.doubt_type(reader), qc.doubt_counts(metrics, report.candidate_counts))):
        warn(f"{reader.uri}: {text}")


def _genes_of(
    reader: Reader, row: SpeciesRow, vocabulary: Vocabulary, *, names: np.ndarray | None = None, column: str = "",
    columns: pa.Table | None = None,
) -> Genes:  # fmt: skip
    """Genes of one species: by these names, or by what `cells.features.identify_genes` reads instead of them."""
    mine, lookup = vocabulary.species_genes(row.name), identify.gene_lookup(row)
    known = frozenset(mine.genes.tolist())
    notes: list[str] = []
    if names is not None:
        columns = identify.identify_columns(
            names, lookup, biotypes=(), vocabulary=known, is_gene=reader.is_gene, kinds=reader.kinds
        )
    else:
        columns, notes = identify_genes(reader, lookup, column, vocabulary=known, columns=columns)
    position_G = mine.positions(columns["gene"].combine_chunks())
    there = np.unique(position_G[position_G >= 0])
    own = identify.is_first(columns)
    return Genes(
        row=row, columns=columns, position_G=np.where(own, position_G, -1).astype(np.int32),
        measured=mine.tokens[there], of_species=mine, notes=tuple(notes),
    )  # fmt: skip


def _written(genes: Genes) -> tuple[int, int]:
    """Genes that are written as ids or current symbols, so that ids of one species are not read as aliases of another; and all."""
    how = zip(genes.columns["how"].to_pylist(), genes.columns["spelling"].to_pylist(), strict=True)
    return sum(kind in (identify.ID, identify.SYMBOL) and not other for kind, other in how), len(genes.measured)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sentences:
    """Sentences of consecutive cells, packed; what `mixgf.encoder.embed` reads."""

    start: int
    """Row of the first cell."""
    tokens_T: I32
    offsets_N1: I64
    cls: bool
    genes_N: npt.NDArray[np.int64]
    """Detected genes of the vocabulary in each cell; 0: the sentence is empty."""
    metrics: qc.Metrics | None = None
    counts_NG: sparse.csr_matrix | None = None
    """Raw counts over the genes of the species in the vocabulary (`Genes.of_species`), where they are asked for."""

    @property
    def lengths_N(self) -> I32:
        """Tokens of each cell."""
        return np.diff(self.offsets_N1).astype(np.int32)

    def tokens(self, cells: npt.ArrayLike) -> tuple[I32, I64]:
        """Sentences of the given cells (0 = the first), packed in the given order, and their offsets."""
        return take(self.tokens_T, self.offsets_N1, np.asarray(cells, dtype=np.int64))


def take(tokens_T: I32, offsets_N1: I64, cells_B: I64, max_len: int = 0) -> tuple[I32, I64]:
    """Some of many packed sentences, in the given order; longer ones are cut to `max_len` tokens, 0 = none is."""
    lengths_B = offsets_N1[cells_B + 1] - offsets_N1[cells_B]
    offsets_B1 = offsets_of(np.minimum(lengths_B, max_len) if max_len else lengths_B)
    place_T = np.arange(offsets_B1[-1]) + np.repeat(offsets_N1[cells_B] - offsets_B1[:-1], np.diff(offsets_B1))
    return tokens_T[place_T], offsets_B1


def blocks(
    reader: Reader, genes: Genes, tokens: Tokens, start: int, stop: int, *, rows: int, measure: bool = False,
    with_counts: bool = False,
) -> Iterator[Sentences]:  # fmt: skip
    """Sentences of rows [start, stop), of at most `rows` cells at a time.

    Args:
        reader: Of the counts.
        genes: As `find_genes` found them in it.
        tokens: How sentences are made.
        start: First row.
        stop: Row after the last.
        rows: Cells held in memory at a time.
        measure: Work out the metrics of quality control, too.
        with_counts: Keep the raw counts, too.
    """
    encode = rank_value.Encoder(rank_value.Ranks.of(genes.of_species, tokens.scaling), genes.position_G, tokens)
    masks, sums_G = qc.gene_masks(genes.columns), np.zeros(genes.columns.num_rows, dtype=np.int64)
    for block in counts.read_blocks(reader, genes.columns, start, stop, rows=rows):
        num_cells = len(block.indptr) - 1
        row_E = np.repeat(np.arange(num_cells), np.diff(block.indptr))
        counted_E = (block.data > 0) & (genes.position_G[block.indices] >= 0)
        genes_N = np.bincount(row_E[counted_E], minlength=num_cells)
        metrics = qc.cell_metrics(block.data, block.indices, block.indptr, **masks, sums_G=sums_G) if measure else None
        tokens_T, offsets_N1 = encode(block.data, block.indices, block.indptr)
        counts_NG = None
        if with_counts:
            entries = (block.data[counted_E], (row_E[counted_E], genes.position_G[block.indices[counted_E]]))
            counts_NG = sparse.csr_matrix(entries, shape=(num_cells, len(genes.of_species.genes)), dtype=np.float32)
        yield Sentences(
            start=block.start,
            tokens_T=tokens_T,
            offsets_N1=offsets_N1,
            cls=tokens.cls,
            genes_N=genes_N,
            metrics=metrics,
            counts_NG=counts_NG,
        )


class MemoryCorpus(Corpus):
    """A whole table of counts as a corpus that is held in memory: 4 bytes a token, at most `tokens.max_len` tokens a cell.

    Its columns are those that `mixgf prepare` would write, with `source` as the name of the table.
    """

    def __init__(
        self, reader: Reader, genes: Genes, vocabulary: Vocabulary, tokens: Tokens, *, max_len: int = 0, source: str, rows: int = 512,
        with_counts: bool = False,
    ) -> None:  # fmt: skip
        """Read all cells.

        Args:
            reader: Of the counts.
            genes: As `find_genes` found them in it.
            vocabulary: Of the model.
            tokens: How sentences are made.
            max_len: Longest sentence that is seen, as of a `Corpus`; 0 = as they are.
            source: Name of the table, before the names of its cells.
            rows: Cells whose counts are read at a time.
            with_counts: Keep the counts of the vocabulary's genes, 8 bytes each that is not 0.
        """
        self.uri, self._tokens, self._max_len = reader.uri, tokens, max_len
        parts = list(
            blocks(reader, genes, tokens, 0, reader.num_rows, rows=rows, measure=True, with_counts=with_counts)
        )
        empty = np.flatnonzero(np.concatenate([part.genes_N for part in parts]) == 0)
        if len(empty):
            name = reader.cell_names(int(empty[0]), int(empty[0]) + 1)[0]
            msg = f"{reader.uri}: {len(empty)} cells hold no gene of the model, for instance {name} (row {empty[0]}); leave them out"
            raise UserError(msg)
        self._tokens_T = np.concatenate([part.tokens_T for part in parts])
        self.stored_N = np.concatenate([part.lengths_N for part in parts])
        self.counts_NG = (
            sparse.csr_matrix(sparse.vstack([part.counts_NG for part in parts], format="csr")) if with_counts else None
        )
        self._offsets_N1 = offsets_of(self.stored_N)
        self.lengths_N = np.minimum(self.stored_N, max_len).astype(np.int32) if max_len else self.stored_N
        self.species = vocabulary.species
        self.species_N = np.full(len(self.lengths_N), self.species.index(genes.row.name), dtype=np.int8)
        self.vocabulary = vocabulary
        self.record = artifacts.plan("corpus", 0, {"tokens": to_dict(tokens)}, {})
        self.record.details.update({"max_len": tokens.max_len, "vocabulary": vocabulary.hash})
        self._obs = self._columns(
            reader, genes.row.name, source, qc.Metrics.merge([p.metrics for p in parts if p.metrics])
        )

    def _columns(self, reader: Reader, species: str, source: str, metrics: qc.Metrics) -> pd.DataFrame:
        num = reader.num_rows
        columns = {
            "cell": pa.array([f"{source}:{name}" for name in reader.cell_names(0, num)], pa.string()),
            "species": pa.array([species] * num, pa.string()),
            "source": pa.array([source] * num, pa.string()),
            "source_row": pa.array(np.arange(num), pa.int64()),
            "length": pa.array(self.stored_N, pa.int32()),
            "n_counts": pa.array(metrics.n_counts, pa.int64()),
            "n_genes": pa.array(metrics.n_genes, pa.int32()),
            "mito_fraction": pa.array(metrics.mito_fraction, pa.float64()),
        }
        for name, old in name_obs({name: name for name in reader.obs_columns})[0].items():
            found = reader.obs(old, 0, num)
            kind = "str" if found.dtype == object else "float" if found.dtype.kind == "f" else "int"
            columns[name] = obs_array(found, kind, num)
        return pa.table(columns).to_pandas()

    @property
    def columns(self) -> frozenset[str]:
        """Names of all columns, without the tokens."""
        return frozenset(map(str, self._obs.columns))

    def tokens(self, cells: npt.ArrayLike, *, whole: bool = False) -> tuple[I32, I64]:
        """Sentences of the given cells, packed in the given order: tokens (T,) and offsets (B + 1,); as of `Corpus`."""
        max_len = 0 if whole else self._max_len
        return take(self._tokens_T, self._offsets_N1, np.asarray(cells, dtype=np.int64), max_len)

    def obs(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Everything but the tokens, one row per cell."""
        missing = [name for name in columns or [] if name not in self._obs.columns]
        if missing:
            msg = f"{self.uri}: no column {missing[0]!r}; there are {', '.join(self._obs.columns)}"
            raise UserError(msg)
        return self._obs.copy() if columns is None else self._obs[columns].copy()

    def obs_of(self, cells: I64, columns: list[str]) -> pd.DataFrame:
        """Metadata of some cells (B,), in their order; as of `Corpus`."""
        return self.obs(columns).iloc[cells].reset_index(drop=True)
