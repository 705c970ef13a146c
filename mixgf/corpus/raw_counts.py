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
from mixgf.cells import counts
from mixgf.cells.features import identify_genes
from mixgf.cells.open import open_source
from mixgf.config import parse
from mixgf.config.data import Source, SpeciesRow
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.genes import identify
from mixgf.genes.vocabulary import SpeciesGenes
from mixgf.storage import files, tables


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Raw counts of cells of one species."""

    matrix: sparse.csr_matrix
    """Cells x genes."""
    genes: Names
    species: str


def read_counts(
    source: Source, row: SpeciesRow, genes: SpeciesGenes, rows: Ints, *, block_cells: int
) -> sparse.csr_matrix:
    """Raw counts of some cells of a source over the genes of the vocabulary.

    Args:
        source: The file of counts.
        row: The file's species.
        genes: The vocabulary's genes of that species; columns of the result are in their order.
        rows: Rows in the file, ascending.
        block_cells: Rows of the file held in memory at a time.

    Returns:
        int32 counts, (rows, genes).
    """
    if not files.exists(source.uri):
        msg = (f"sources: {source.uri} (source {source.name!r}) is not there any more, and baselines need its raw counts; "
               "put it back, or leave baselines out of classify.models")  # fmt: skip
        raise UserError(msg)
    parts: list[sparse.csr_matrix] = []
    with open_source(source) as reader:
        columns, _ = identify_genes(
            reader, identify.gene_lookup(row), source.genes, vocabulary=frozenset(genes.genes.tolist())
        )
        place = {gene: i for i, gene in enumerate(genes.genes.tolist())}
        first = identify.is_first(columns)
        to = np.array(
            [place.get(gene, -1) if one else -1 for gene, one in zip(columns["gene"].to_pylist(), first, strict=True)]
        )
        start, stop = int(rows[0]), int(rows[-1]) + 1
        for block in counts.read_blocks(reader, columns, start, stop, rows=block_cells):
            low, high = np.searchsorted(rows, [block.start, block.start + len(block.indptr) - 1])
            parts.append(_pick(block, to, rows[low:high] - block.start, len(genes.genes)))
    return sparse.csr_matrix(sparse.vstack(parts, format="csr"))


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
    columns = corpus.obs(["source", "source_row"])
    name = str(columns["source"].iloc[cells[0]])
    entry = next((dict(s) for s in corpus.record.config.get("sources", ()) if s["name"] == name), None)
    if entry is None:
        msg = f"{corpus.uri}: has no record of source {name!r}, so there are no raw counts"
        raise UserError(msg)
    entry.pop("size", None)
    row_of = next(
        parse.from_dict(SpeciesRow, s) for s in corpus.record.config["species"] if s["name"] == entry["species"]
    )
    rows = columns["source_row"].to_numpy()[cells]
    order = np.argsort(rows, kind="stable")
    genes = corpus.vocabulary.species_genes(entry["species"])
    found = read_counts(parse.from_dict(Source, entry), row_of, genes, rows[order], block_cells=block_cells)
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
