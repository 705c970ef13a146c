"""Raw counts of chosen cells, for baselines that read counts, and a shared gene space for several species.

Counts are read once per source, over the genes of the vocabulary, and cached as Parquet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy import sparse

from mixgf.arrays import Ints, Names
from mixgf.cells import counts, qc
from mixgf.cells.features import identify_genes
from mixgf.cells.open import open_source
from mixgf.cells.reader import Reader
from mixgf.config import parse
from mixgf.config.data import Source, SpeciesRow
from mixgf.console import warn
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.genes import identify
from mixgf.genes.vocabulary import SpeciesGenes
from mixgf.storage import artifacts, files, tables


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Raw counts of cells of one species."""

    matrix: sparse.csr_matrix
    """Cells x genes."""
    genes: Names
    species: str


@dataclass(frozen=True, kw_only=True, eq=False)
class CellsOfSource:
    """N cells of one source, as a corpus knows them."""

    rows_N: Ints
    """Rows that they had in the file."""
    names_N: Names
    """Their names in the file."""
    depth_N: Ints
    """Sum of all their counts."""
    hashes_N: qc.Hashes | None
    """Hashes of their counts by gene; None where the corpus has none."""

    @classmethod
    def of_corpus(cls, corpus: Corpus, source: str, cells: Ints) -> CellsOfSource:
        """Cells by their numbers in the corpus, all of one source."""
        obs = corpus.obs_of(cells, ["cell", "source_row", "n_counts"])
        hashes = None
        if "hashes.parquet" in corpus.record.files:
            table = artifacts.read_artifact_table(corpus.uri, "hashes")
            hashes = qc.Hashes(*(table[name].to_numpy()[cells] for name in qc.Hashes._fields))
        return cls(
            rows_N=obs["source_row"].to_numpy(), depth_N=obs["n_counts"].to_numpy(), hashes_N=hashes,
            names_N=np.array([name.removeprefix(f"{source}:") for name in obs["cell"]], dtype=object),
        )  # fmt: skip


def read_counts(
    source: Source, row: SpeciesRow, genes: SpeciesGenes, wanted: CellsOfSource, *, block_cells: int
) -> sparse.csr_matrix:
    """Raw counts of some cells of a source over the genes of the vocabulary.

    The cells are the rows that they were when the corpus was made, if the file has their names there, else the rows with their
    names. Depth and hash of what is read must be those of the corpus.

    Args:
        source: The file of counts.
        row: The file's species.
        genes: The vocabulary's genes of that species; columns of the result are in their order.
        wanted: The cells.
        block_cells: Rows of the file held in memory at a time.

    Returns:
        int32 counts, (cells, genes), in the order of the cells.

    Raises:
        UserError: The file is gone, lacks a cell, or has other counts for one.
    """
    if not files.exists(source.uri):
        msg = (f"sources: {source.uri} (source {source.name!r}) is not there any more, and baselines need its raw counts; "
               "put it back, or leave baselines out of classify.models")  # fmt: skip
        raise UserError(msg)
    parts: list[sparse.csr_matrix] = []
    measured: list[qc.Metrics] = []
    with open_source(source) as reader:
        columns, _ = identify_genes(
            reader, identify.gene_lookup(row), source.genes, vocabulary=frozenset(genes.genes.tolist())
        )
        place = {gene: i for i, gene in enumerate(genes.genes.tolist())}
        first = identify.is_first(columns)
        to = np.array(
            [place.get(gene, -1) if one else -1 for gene, one in zip(columns["gene"].to_pylist(), first, strict=True)]
        )
        masks = qc.gene_masks(columns)
        rows_N = _rows_of(reader, source, wanted)
        order = np.argsort(rows_N, kind="stable")
        rows = rows_N[order]
        start, stop = int(rows[0]), int(rows[-1]) + 1
        for block in counts.read_blocks(reader, columns, start, stop, rows=block_cells):
            low, high = np.searchsorted(rows, [block.start, block.start + len(block.indptr) - 1])
            mine = rows[low:high] - block.start
            sums_G = np.zeros(columns.num_rows, dtype=np.int64)
            metrics = qc.cell_metrics(block.data, block.indices, block.indptr, **masks, sums_G=sums_G)
            measured.append(qc.Metrics(*(getattr(metrics, name)[mine] for name in qc.Metrics.__slots__)))
            parts.append(_pick(block, to, mine, len(genes.genes)))
    _require_same(source, wanted, order, qc.Metrics.merge(measured))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return sparse.csr_matrix(sparse.vstack(parts, format="csr")[back])


_RESTORE = "put the file back as it was, or prepare the corpus again"


def _rows_of(reader: Reader, source: Source, wanted: CellsOfSource) -> Ints:
    """Row of every cell: where it was, if all have their names there, else by name."""
    start, stop = int(wanted.rows_N.min()), int(wanted.rows_N.max()) + 1
    if stop <= reader.num_rows:
        names = np.array(list(reader.cell_names(start, stop)), dtype=object)
        if (names[wanted.rows_N - start] == wanted.names_N).all():
            return wanted.rows_N
    asked, row_of = set(wanted.names_N), dict[str, int]()
    for row, name in enumerate(reader.cell_names(0, reader.num_rows)):
        if name in asked and row_of.setdefault(name, row) != row:
            msg = f"{source.uri}: rows are not those that the corpus was made from, and two are called {name!r}; {_RESTORE}"
            raise UserError(msg)
    gone = [name for name in wanted.names_N if name not in row_of]
    if gone:
        msg = (
            f"{source.uri}: {len(gone):,} of {len(wanted.names_N):,} cells of the corpus are not there, "
            f"such as {gone[0]!r}; {_RESTORE}"
        )
        raise UserError(msg)
    warn(f"{source.uri}: rows are in another order than when the corpus was made; cells are found by their names")
    return np.array([row_of[name] for name in wanted.names_N], dtype=np.int64)


def _require_same(source: Source, wanted: CellsOfSource, order: Ints, found: qc.Metrics) -> None:
    """Raise a `UserError` if the counts that were read, of the cells in `order`, are not those of the corpus."""
    depth_N = wanted.depth_N[order]
    other_N = found.n_counts != depth_N
    if other_N.any():
        at = int(np.flatnonzero(other_N)[0])
        what = f"{wanted.names_N[order][at]!r} has a depth of {found.n_counts[at]:,}, not {depth_N[at]:,}"
    elif wanted.hashes_N is not None:
        other_N = (found.hash_a != wanted.hashes_N.a[order]) | (found.hash_b != wanted.hashes_N.b[order])
        if not other_N.any():
            return
        what = f"{wanted.names_N[order][int(np.flatnonzero(other_N)[0])]!r} has the same depth on other genes"
    else:
        return
    msg = (
        f"{source.uri}: {other_N.sum():,} of {len(other_N):,} cells have other counts than when the corpus was made: "
        f"{what}; {_RESTORE}"
    )
    raise UserError(msg)


def read_cells(corpus: Corpus, cells: Ints, *, block_cells: int) -> tuple[Ints, sparse.csr_matrix]:
    """Raw counts of cells of a corpus that are all of one source, over the genes of their species in the vocabulary.

    Args:
        corpus: The corpus.
        cells: Numbers in the corpus.
        block_cells: Rows of the file held in memory at a time.

    Returns:
        The cells in the order of the source's rows, and their counts (cells, genes).

    Raises:
        UserError: The corpus knows no source of the cells, as one that was imported, or the file is not there any more.
    """
    if corpus.counts_NG is not None:
        return cells, sparse.csr_matrix(corpus.counts_NG[cells])
    name = str(corpus.obs_of(cells[:1], ["source"])["source"][0])
    entry = next((dict(s) for s in corpus.record.config.get("sources", ()) if s["name"] == name), None)
    if entry is None:
        msg = f"{corpus.uri}: has no record of source {name!r}, so there are no raw counts"
        raise UserError(msg)
    entry.pop("size", None)
    row_of = next(
        parse.from_dict(SpeciesRow, s) for s in corpus.record.config["species"] if s["name"] == entry["species"]
    )
    rows = corpus.obs_of(cells, ["source_row"])["source_row"].to_numpy()
    order = np.argsort(rows, kind="stable")
    genes = corpus.vocabulary.species_genes(entry["species"])
    wanted = CellsOfSource.of_corpus(corpus, name, cells[order])
    found = read_counts(parse.from_dict(Source, entry), row_of, genes, wanted, block_cells=block_cells)
    return cells[order], found


def _pick(block: counts.Block, to: Ints, rows: Ints, num_genes: int) -> sparse.csr_matrix:
    lengths = np.diff(block.indptr)
    wanted = np.zeros(len(lengths), dtype=bool)
    wanted[rows] = True
    column = to[block.indices]
    keep = np.repeat(wanted, lengths) & (column >= 0)
    row_of = np.repeat(np.cumsum(wanted) - 1, lengths)
    return sparse.csr_matrix(
        (block.data[keep], (row_of[keep], column[keep])), shape=(len(rows), num_genes), dtype=np.int32
    )


def save_counts(uri: str, cells: Ints, matrix: sparse.csr_matrix) -> None:
    """Write counts as Parquet: cell (global number), and lists of gene columns and counts."""
    offsets = pa.array(matrix.indptr.astype(np.int32), pa.int32())
    lists = {"genes": matrix.indices.astype(np.int32), "counts": matrix.data.astype(np.int32)}
    columns = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}
    tables.write_table(uri, pa.table({"cell": pa.array(cells, pa.int64()), **columns}), row_group_size=2_500)


def load_counts(uri: str, num_genes: int) -> tuple[Ints, sparse.csr_matrix]:
    """Read what `save_counts` wrote: global cell numbers, and their counts as float32 (cells, genes)."""
    table = tables.read_table(uri).combine_chunks()
    lists = [table[name].combine_chunks() for name in ("genes", "counts")]
    genes, values = (one.chunk(0) if isinstance(one, pa.ChunkedArray) else one for one in lists)
    matrix = sparse.csr_matrix(
        (values.values.to_numpy().astype(np.float32), genes.values.to_numpy(), genes.offsets.to_numpy()),
        shape=(table.num_rows, num_genes),
    )
    return table["cell"].to_numpy(), matrix


def shared_gene_space(
    blocks: Sequence[Counts], orthologs: Mapping[tuple[str, str], Mapping[str, str]]
) -> tuple[list[sparse.csr_matrix], Names]:
    """Counts of several blocks in one gene space.

    With one species it is the union of the blocks' genes; absent genes are 0. With several it is the genes of the first
    species (by name) that have a measured one-to-one ortholog in each of the others.

    Args:
        blocks: Counts of one species each.
        orthologs: `species.orthologs`: (species a, species b) to gene of a to gene of b.

    Returns:
        One matrix per block, all with the same columns, and the genes of those columns.
    """
    species = sorted({block.species for block in blocks})
    first = species[0]
    genes = np.unique(np.concatenate([b.genes for b in blocks if b.species == first]))
    for other in species[1:]:
        pairs = orthologs.get((first, other), {})
        have = set(np.concatenate([b.genes for b in blocks if b.species == other]).tolist())
        genes = genes[np.array([pairs.get(g, "") in have for g in genes.tolist()], dtype=bool)]
    if not len(genes):
        msg = f"vocab.orthologs: no one-to-one orthologs of {' and '.join(species)}; baselines between species need a table of them"
        raise UserError(msg)
    return [
        _columns(b, genes, orthologs.get((first, b.species), {}) if b.species != first else None) for b in blocks
    ], genes


def _columns(block: Counts, genes: Names, pairs: Mapping[str, str] | None) -> sparse.csr_matrix:
    wanted = genes if pairs is None else np.array([pairs[g] for g in genes.tolist()], dtype=np.str_)
    column = {gene: i for i, gene in enumerate(block.genes.tolist())}
    source = np.array([column.get(gene, -1) for gene in wanted.tolist()], dtype=np.int64)
    target = np.flatnonzero(source >= 0)
    pick = sparse.csr_matrix(
        (np.ones(len(target), dtype=np.float32), (source[target], target)), shape=(len(block.genes), len(genes))
    )
    return sparse.csr_matrix(block.matrix.astype(np.float32) @ pick)
