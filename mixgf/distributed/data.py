"""Cells as Ray Data: data sets of count files and of corpora, for a user's own pipelines.

    read_cells(sources)     raw counts of any files that `prepare` reads, one row per cell     operator ReadCells
    read_corpus(uri)        sentences and obs of a finished corpus, one row per cell           operator ReadCorpus

The stages' own passes over cells are Ray Data pipelines, too: `mixgf.distributed.pipelines`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from mixgf.cells import counts, row_major
from mixgf.cells.features import identify_genes
from mixgf.cells.open import open_source
from mixgf.cells.packed_counts import INT32S
from mixgf.cells.reader import Reader
from mixgf.cells.sources import expand_sources
from mixgf.config.data import Source, SpeciesRow
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.corpus.shards import OBS_TYPES, merge_kinds, obs_array, obs_kind
from mixgf.distributed.datasource import Piece, Pieces, dataset
from mixgf.errors import UserError
from mixgf.genes import identify, species
from mixgf.storage import artifacts, files, tables

BLOCK_CELLS = 10_000
"""Cells of a block of `read_cells`."""
READ_CELLS = 1_024
"""Cells that a task of `read_cells` decodes at a time."""
DESCRIBED = 32
"""Most files that a task opens to find their sizes and columns."""
CELLS = pa.schema(
    [
        ("cell", pa.string()), ("species", pa.string()), ("source", pa.string()), ("source_row", pa.int64()),
        ("genes", INT32S), ("counts", INT32S),
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
    if unknown := [name for name in columns or () if name not in schema.names]:
        msg = f"{uri}: no column {unknown[0]!r}; there are {', '.join(schema.names)}"
        raise UserError(msg)
    pieces = [
        Piece(
            read=partial(_read_shard, corpus.shard_uri(i)), rows=int(corpus.shard_rows[i]),
            uri=corpus.shard_uri(i), num_bytes=int(corpus.lengths_N[corpus.starts[i] : corpus.starts[i + 1]].sum()) * 4,
        )
        for i in range(len(corpus.shards))
    ]  # fmt: skip
    return dataset(_pruned(Pieces("Corpus", pieces, schema, prunes=True), columns))


def _pruned(source: Pieces, columns: Sequence[str] | None) -> Pieces:
    """The source with these columns only; Ray Data does the same for `select_columns`."""
    return source if columns is None else source.apply_projection({name: name for name in columns})


def _read_shard(uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Tables of a shard, one per row group."""
    for table in tables.read_row_groups(uri, list(columns)):
        missing = {name: pa.nulls(table.num_rows) for name in columns if name not in table.column_names}
        yield pa.table({name: missing[name] if name in missing else table[name] for name in columns})


# count files


def read_cells(
    sources: Sequence[Source] | Mapping[str, str | Sequence[str]],
    *,
    columns: Sequence[str] | None = None,
    obs: Sequence[str] | None = None,
    species_rows: Sequence[SpeciesRow] | None = None,
    block_cells: int = BLOCK_CELLS,
) -> Dataset:
    """Raw counts of count files as a Ray Data data set, one row per cell.

    Columns: `cell` (source and barcode), `species`, `source`, `source_row`; `genes` and `counts`, two lists of int32
    that are a row of a CSR matrix: genes are row numbers of the species' gene table (`mixgf.genes.species.gene_table`),
    ascending, and columns of one gene are summed; then the columns of obs. Cells are not filtered. Counts of unknown genes
    are left out.

    A read task reads `block_cells` rows of a row-major file. A column-major file (10x folder, CSC) is one task: it is
    scanned once, written as rows to the worker's temporary folder (`mixgf.cells.row_major`), and streamed from there.
    Files are opened by tasks, too, to find their sizes and columns; the driver opens none.

    Args:
        sources: files as `prepare` takes them (local or on object storage; patterns are expanded), or species to files, for
            example `{"human": ["a.h5ad", "s3://bucket/tenx"]}`.
        columns: those of the data set; None = all. Others are not read, also those that `select_columns` leaves out;
            without `genes` and `counts`, no matrix is read.
        obs: columns of obs to read, by their names in the file; null where a source lacks one. None = all.
        species_rows: known species; None = those of the default configuration.
        block_cells: rows of a read task.

    Raises:
        UserError: files are missing or damaged, a species is unknown, or a column is in no source. A value that is no
            count ends the data set with the file, the cell and the gene.
    """
    if isinstance(sources, Mapping):
        listed = [(name, [uris] if isinstance(uris, str) else uris) for name, uris in sources.items()]
        sources = [Source(uri=uri, species=name) for name, uris in listed for uri in uris]
    rows = {row.name: row for row in (Config().species if species_rows is None else species_rows)}
    expanded = expand_sources([_with_absolute_uri(source) for source in sources])
    for source in expanded:
        if source.species not in rows:
            msg = f"sources.species = {source.species!r}: must be one of {', '.join(rows)}"
            raise UserError(msg)
    found = _describe_all(expanded, obs)
    kinds: dict[str, set[str]] = {}
    for facts in found:
        for name, kind in facts.kinds.items():
            kinds.setdefault(name, set()).add(kind)
    if unknown := [name for name in obs or () if name not in kinds]:
        msg = f"obs = {unknown[0]!r}: no source has such a column"
        raise UserError(msg)
    wanted = merge_kinds(kinds)
    schema = pa.schema([*CELLS, *((name, OBS_TYPES[kind]) for name, kind in wanted.items())])
    if unknown := [name for name in columns or () if name not in schema.names]:
        msg = f"columns = {unknown[0]!r}: no such column; there are {', '.join(schema.names)}"
        raise UserError(msg)
    pieces = [
        Piece(
            read=partial(_read_cells, source, rows[source.species], start, stop, wanted), rows=stop - start,
            uri=source.uri, num_bytes=(stop - start) * 16_000,
        )
        for source, facts in zip(expanded, found, strict=True)
        for start, stop in _row_ranges(facts, block_cells)
    ]  # fmt: skip
    return dataset(_pruned(Pieces("Cells", pieces, schema, prunes=True), columns))


def _with_absolute_uri(source: Source) -> Source:
    return replace(source, uri=_absolute(source.uri))


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the plan of `read_cells` needs to know of a source."""

    rows: int
    by_column: bool
    kinds: dict[str, str]
    """Kind of each column of obs (`shards.obs_kind`)."""


def _describe(sources: Sequence[Source], obs: Sequence[str] | None) -> list[_Facts | str]:
    """Facts of each source, or why it cannot be used."""
    found: list[_Facts | str] = []
    for source in sources:
        try:
            with open_source(source) as reader:
                names = [name for name in (reader.obs_columns if obs is None else obs) if name not in CELLS.names]
                kinds = {name: obs_kind(reader.obs(name, 0, 1)) for name in names if name in reader.obs_columns}
                found.append(_Facts(reader.num_rows, reader.scan is not None, kinds))
        except UserError as error:
            found.append(str(error))
    return found


def _describe_all(sources: Sequence[Source], obs: Sequence[str] | None) -> list[_Facts]:
    """Facts of all sources, by tasks of at most `DESCRIBED` sources.

    Raises:
        UserError: a source cannot be used; the message names up to three of them.
    """
    each = min(DESCRIBED, -(-len(sources) // 64))
    task = ray.remote(max_retries=3, retry_exceptions=[OSError])(_describe)
    found = ray.get([task.remote(sources[a : a + each], obs) for a in range(0, len(sources), each)])
    every = [facts for group in found for facts in group]
    if errors := [facts for facts in every if isinstance(facts, str)]:
        more = f"; and {len(errors) - 3} more of {len(sources)} sources" if len(errors) > 3 else ""
        raise UserError("; ".join(errors[:3]) + more)
    return [facts for facts in every if not isinstance(facts, str)]


def _row_ranges(facts: _Facts, block_cells: int) -> list[tuple[int, int]]:
    each = max(1, facts.rows) if facts.by_column else block_cells
    return [(start, min(start + each, facts.rows)) for start in range(0, facts.rows, each)]


def _read_cells(  # noqa: PLR0917 (bound by `partial`)
    source: Source, row: SpeciesRow, start: int, stop: int, obs: Mapping[str, str], columns: Sequence[str]
) -> Iterator[pa.Table]:  # fmt: skip
    """Tables of rows [start, stop) of a source with the given columns, of `CELLS` and of `obs` (name to kind)."""
    with open_source(source) as reader, tempfile.TemporaryDirectory(prefix="mixgf-") as folder:
        if not {"genes", "counts"} & set(columns):
            for a in range(start, stop, READ_CELLS):
                yield _table(reader, source, a, min(a + READ_CELLS, stop), obs=obs, columns=columns, lists={})
            return
        if reader.scan is not None:
            row_major.write_rows(reader, folder)
            reader.read = partial(row_major.read_rows, folder)
        listed = species.gene_table(row)["gene"].combine_chunks()
        known, _ = identify_genes(reader, identify.gene_lookup(row), source.genes)
        number_G = pc.fill_null(pc.index_in(known["gene"].combine_chunks(), value_set=listed), -1).to_numpy()
        number_G = np.where(identify.is_first(known), number_G, -1).astype(np.int32)
        for block in counts.read_blocks(reader, known, start, stop, rows=READ_CELLS):
            num = len(block.indptr) - 1
            cell_T = np.repeat(np.arange(num), np.diff(block.indptr))
            gene_T = number_G[block.indices]
            keep_T = (gene_T >= 0) & (block.data > 0)
            order = np.lexsort((gene_T[keep_T], cell_T[keep_T]))
            offsets = np.concatenate([[0], np.cumsum(np.bincount(cell_T[keep_T], minlength=num))]).astype(np.int32)
            lists = {
                name: pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[keep_T][order]), INT32S)
                for name, values in (("genes", gene_T), ("counts", block.data))
            }
            yield _table(reader, source, block.start, block.start + num, obs=obs, columns=columns, lists=lists)


def _table(
    reader: Reader, source: Source, begin: int, end: int, *, obs: Mapping[str, str], columns: Sequence[str],
    lists: Mapping[str, pa.Array],
) -> pa.Table:  # fmt: skip
    """Rows [begin, end) of a source with the given columns; `lists` holds their genes and counts."""
    held: dict[str, pa.Array] = {"source_row": pa.array(np.arange(begin, end), pa.int64()), **lists}
    for name in columns:
        if name == "cell":
            held[name] = pa.array([f"{source.name}:{cell}" for cell in reader.cell_names(begin, end)], pa.string())
        elif name in ("species", "source"):
            held[name] = pa.array([source.species if name == "species" else source.name] * (end - begin), pa.string())
        elif name in obs:
            values = reader.obs(name, begin, end) if name in reader.obs_columns else None
            held[name] = obs_array(values, obs[name], end - begin)
    return pa.table(held).select(list(columns))
