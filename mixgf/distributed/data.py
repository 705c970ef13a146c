"""Cells as Ray Data: data sets of count files and of corpora, for a user's own pipelines.

    read_cells(sources)     raw counts of any files that `prepare` reads, one row per cell     operator ReadCells
    read_corpus(uri)        sentences and obs of a finished corpus, one row per cell           operator ReadCorpus

The stages' own passes over cells are Ray Data pipelines, too: `mixgf.distributed.pipelines`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.data import Dataset

from mixgf.cells import counts
from mixgf.cells.open import open_reader
from mixgf.cells.sources import expand_sources
from mixgf.config.data import Source, SpeciesRow
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.corpus.shards import OBS_TYPES, merge_kinds, obs_array, obs_kind
from mixgf.distributed.datasource import Piece, Pieces, dataset
from mixgf.errors import UserError
from mixgf.genes import identify, species
from mixgf.storage import artifacts, files

BLOCK_CELLS = 10_000
"""Cells of a block of `read_cells`."""
READ_CELLS = 1_024
"""Cells that a task of `read_cells` decodes at a time."""
_INT32S = pa.list_(pa.field("element", pa.int32(), nullable=False))
CELLS = pa.schema(
    [
        ("cell", pa.string()), ("species", pa.string()), ("source", pa.string()), ("source_row", pa.int64()),
        ("genes", _INT32S), ("counts", _INT32S),
    ]
)  # fmt: skip
"""Columns of `read_cells` before those of obs."""


def _absolute(uri: str) -> str:
    """A URI that means the same in every process: Ray's workers have another working directory."""
    return uri if ":" in uri else str(Path(uri).absolute())


# corpora


def read_corpus(uri: str, columns: Sequence[str] | None = None) -> Dataset:
    """Cells of a finished corpus as a Ray Data data set, one row per cell and one read task per shard.

    Rows come in the corpus' order if `DataContext.get_current().execution_options.preserve_order` is set. A shard that
    lacks a column has nulls there.

    Args:
        uri: of a corpus, or of a run that holds one; local or s3://.
        columns: those to read; None = all: `tokens` (list of int32), `length`, `cell`, `species`, `source`,
            `source_row`, `n_counts`, `n_genes`, `mito_fraction` and the columns of obs. Others are not read from storage.

    Raises:
        UserError: there is no finished corpus, or no shard has such a column.
    """
    uri = _absolute(uri)
    if artifacts.find(uri) is None and artifacts.find(files.join(uri, "corpus")) is not None:
        uri = files.join(uri, "corpus")
    corpus = Corpus(uri)
    schema = corpus.shard_schema(0)
    if columns is not None:
        if unknown := [name for name in columns if name not in schema.names and name not in corpus.columns]:
            msg = f"{uri}: no column {unknown[0]!r}; there are {', '.join(['tokens', *sorted(corpus.columns)])}"
            raise UserError(msg)
        schema = pa.schema([schema.field(name) for name in columns if name in schema.names])
    names = None if columns is None else tuple(columns)
    pieces = [
        Piece(
            read=partial(_read_shard, corpus.shard_uri(i), names), rows=int(corpus.shard_rows[i]),
            uri=corpus.shard_uri(i), num_bytes=int(corpus.lengths_N[corpus.starts[i] : corpus.starts[i + 1]].sum()) * 4,
        )
        for i in range(len(corpus.shards))
    ]  # fmt: skip
    return dataset(Pieces("Corpus", pieces, schema))


def _read_shard(uri: str, columns: tuple[str, ...] | None) -> Iterator[pa.Table]:
    """Tables of a shard, one per row group."""
    with files.open_read(uri) as file:
        shard = pq.ParquetFile(file)
        names = shard.schema_arrow.names if columns is None else columns
        there = [name for name in names if name in shard.schema_arrow.names]
        for group in range(shard.num_row_groups):
            table = shard.read_row_group(group, there, use_threads=False)
            for name in names:
                if name not in there:
                    table = table.append_column(name, pa.nulls(shard.metadata.row_group(group).num_rows))
            yield table.select(list(names))


# count files


def read_cells(
    sources: Sequence[Source] | Mapping[str, str | Sequence[str]],
    *,
    obs: Sequence[str] | None = None,
    species_rows: Sequence[SpeciesRow] | None = None,
    block_cells: int = BLOCK_CELLS,
) -> Dataset:
    """Raw counts of count files as a Ray Data data set: one row per cell, one read task per range of `block_cells` rows.

    Columns: `cell` (source and barcode), `species`, `source`, `source_row`; `genes` and `counts`, two lists of int32
    that are a row of a CSR matrix: genes are row numbers of the species' gene table (`mixgf.genes.species.gene_table`),
    ascending, and columns of one gene are summed; then the columns of obs. Cells are not filtered. Counts of unknown genes
    are left out.

    Args:
        sources: files as `prepare` takes them (.h5ad, 10x .h5, 10x folders; local or s3://; patterns are expanded), or
            species to files, for example `{"human": ["a.h5ad", "s3://bucket/tenx"]}`.
        obs: columns of obs to read, by their names in the file; null where a source lacks one. None = all.
        species_rows: known species; None = those of the default configuration.
        block_cells: rows of a block. A column-major file (10x folder, CSC) is scanned once per block.

    Raises:
        UserError: a file is missing or damaged, a species is unknown, or a column is in no source. A value that is no
            count ends the data set with the file, the cell and the gene.
    """
    if isinstance(sources, Mapping):
        listed = [(name, [uris] if isinstance(uris, str) else uris) for name, uris in sources.items()]
        sources = [Source(uri=uri, species=name) for name, uris in listed for uri in uris]
    rows = {row.name: row for row in (Config().species if species_rows is None else species_rows)}
    expanded = expand_sources([_with_absolute_uri(source) for source in sources])
    kinds: dict[str, set[str]] = {}
    sizes: list[int] = []
    for source in expanded:
        if source.species not in rows:
            msg = f"sources.species = {source.species!r}: must be one of {', '.join(rows)}"
            raise UserError(msg)
        with open_reader(source.uri, source.layer) as reader:
            sizes.append(reader.num_rows)
            for name in reader.obs_columns if obs is None else obs:
                if name in reader.obs_columns and name not in CELLS.names:
                    kinds.setdefault(name, set()).add(obs_kind(reader.obs(name, 0, 1)))
    if unknown := [name for name in obs or () if name not in kinds]:
        msg = f"obs = {unknown[0]!r}: no source has such a column"
        raise UserError(msg)
    wanted = merge_kinds(kinds)
    pieces = [
        Piece(
            read=partial(_read_cells, source, rows[source.species], start, min(start + block_cells, num), wanted),
            rows=min(start + block_cells, num) - start, uri=source.uri,
            num_bytes=(min(start + block_cells, num) - start) * 16_000,
        )
        for source, num in zip(expanded, sizes, strict=True)
        for start in range(0, num, block_cells)
    ]  # fmt: skip
    schema = pa.schema([*CELLS, *((name, OBS_TYPES[kind]) for name, kind in wanted.items())])
    return dataset(Pieces("Cells", pieces, schema))


def _with_absolute_uri(source: Source) -> Source:
    return replace(source, uri=_absolute(source.uri))


def _read_cells(source: Source, row: SpeciesRow, start: int, stop: int, obs: Mapping[str, str]) -> Iterator[pa.Table]:
    """Tables of rows [start, stop) of a source; schema `CELLS`, then `obs` (name to kind)."""
    listed = species.gene_table(row)["gene"].combine_chunks()
    with open_reader(source.uri, source.layer) as reader:
        columns = identify.identify_columns(
            reader.gene_names(source.genes), identify.gene_lookup(row), biotypes=(), is_gene=reader.is_gene
        )
        number_G = pc.fill_null(pc.index_in(columns["gene"].combine_chunks(), value_set=listed), -1).to_numpy()
        first_G = columns["canonical"].to_numpy() == np.arange(
            columns.num_rows
        )  # the other columns were added to these
        number_G = np.where(first_G, number_G, -1).astype(np.int32)
        for block in counts.read_blocks(reader, columns, start, stop, rows=READ_CELLS):
            num = len(block.indptr) - 1
            cell_T = np.repeat(np.arange(num), np.diff(block.indptr))
            gene_T = number_G[block.indices]
            keep_T = (gene_T >= 0) & (block.data > 0)
            order = np.lexsort((gene_T[keep_T], cell_T[keep_T]))
            offsets = np.concatenate([[0], np.cumsum(np.bincount(cell_T[keep_T], minlength=num))]).astype(np.int32)
            begin, end = block.start, block.start + num
            lists = [
                pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[keep_T][order]), _INT32S)
                for values in (gene_T, block.data)
            ]
            table = pa.table(
                [
                    pa.array([f"{source.name}:{name}" for name in reader.cell_names(begin, end)], pa.string()),
                    pa.array([source.species] * num, pa.string()), pa.array([source.name] * num, pa.string()),
                    pa.array(np.arange(begin, end), pa.int64()), *lists,
                ],
                schema=CELLS,
            )  # fmt: skip
            for name, kind in obs.items():
                values = reader.obs(name, begin, end) if name in reader.obs_columns else None
                table = table.append_column(name, obs_array(values, kind, num))
            yield table
