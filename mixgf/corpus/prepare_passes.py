"""The three passes of `prepare`: metrics of cells, medians of genes, shards of sentences; one task per row range.

A task reads the rows of its range and writes its own part file. The passes over rows of cells are pipelines (`measure_cells`,
`sketch_medians`, `encode_shard`): read, transform, write. The first one reads the sources and writes a packed copy of the counts
(`mixgf.cells.packed_counts`), which the others read. Tasks run in any order and any number of times: a part
file is written atomically and its bytes do not depend on the worker, so a killed task is repeated. A source that cannot
be used raises `UserError`.

Part files in the work folder (Parquet, but for the .json): sources/I.json and sources/I (facts and columns of source I),
row_order-I and row_order/I (column-major sources as rows), counts-I/A-B (packed counts of rows [A, B)), sums/R and metrics/R
(counts by column, and cells, of row range R), group_metrics/K (cells of group K of sources), facts/0 (facts of all sources), near/R
(signatures of its cells), doublets/I-K (group K of calls of source I), gene_reports/K and genes-SPECIES/K (group K of sources),
genes/SPECIES, sketch/N, done/N (information on shard N).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.arrays import empty
from mixgf.cells import counts, near_duplicates, packed_counts, qc, row_major
from mixgf.cells.doublets import scrublet
from mixgf.cells.features import describe_unknown, identify_genes, require_cells
from mixgf.cells.kinds import doubt_type
from mixgf.cells.open import open_source, source_files, stamp_of
from mixgf.cells.reader import Reader
from mixgf.config.data import QC, Source, SpeciesRow, Tokens
from mixgf.console import warn
from mixgf.corpus import near_hashes, rank_value, shards
from mixgf.corpus.shards import (
    DOUBLET_COLUMNS,
    SENTENCES,
    facts_uri,
    name_obs,
    obs_array,
    obs_kind,
    part_uri,
    sentence_schema,
)
from mixgf.errors import UserError
from mixgf.execution import Pipeline
from mixgf.genes import identify, medians
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import files
from mixgf.storage.sealed import read_sealed, write_sealed
from mixgf.storage.tables import read_batches, read_table, write_batches, write_table, write_tables


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows [start, stop) of source number `index`: what one task reads, and at most one shard."""

    number: int
    index: int
    source: Source
    start: int
    stop: int


def plan_row_ranges(sources: dict[int, tuple[Source, int]], shard_cells: int) -> list[RowRange]:
    """Cut sources (number to source and its number of rows) into row ranges of at most `shard_cells` rows, in order."""
    ranges = [
        (i, source, a, min(a + shard_cells, rows))
        for i, (source, rows) in sorted(sources.items())
        for a in range(0, rows, shard_cells)
    ]
    return [RowRange(number=n, index=i, source=s, start=a, stop=b) for n, (i, s, a, b) in enumerate(ranges)]


def describe_source(
    work: str,
    index: int,
    source: Source,
    *,
    row: SpeciesRow,
    rules: QC,
    biotypes: tuple[str, ...],
    allowed: dict[str, list[str]] | None,
    others: Sequence[SpeciesRow] = (),
) -> None:
    """Open one source, identify its genes and obs columns; write the facts as part files.

    Args:
        work: URI of the work folder.
        index: number of the source.
        source: the source.
        row: its species.
        rules: quality control.
        biotypes: biotypes of genes that may enter the vocabulary.
        allowed: by species, the only genes that may enter it (from imported medians or a given vocabulary); None = any.
        others: the other species, to recognise a wrong one.

    Raises:
        UserError: the file cannot be read, is empty, lacks a column, or too few of its genes are known.
    """
    with open_source(source) as reader:
        stamp = stamp_of(source.uri)  # what is written from now on is noticed
        require_cells(reader)
        vocabulary = frozenset(allowed[source.species]) if allowed and source.species in allowed else None
        known = identify.gene_lookup(row)
        columns, notes = identify_genes(reader, known, source.genes, biotypes=biotypes, vocabulary=vocabulary)
        num_known = sum(columns["candidate"].to_pylist())
        if num_known < rules.min_genes:
            raise _unknown_genes(reader, source, columns, known, others, num_known=num_known, least=rules.min_genes)
        obs, more = name_obs(_obs_names(reader, source), () if rules.doublets == "off" else tuple(DOUBLET_COLUMNS))
        notes += more
        if doubt := doubt_type(reader):
            notes.append(doubt)
        if source.round:
            notes.append("values are rounded to whole numbers (round)")
        if source.sample and source.sample not in reader.obs_columns:
            raise _no_column(reader, f"sources[{index}].sample", source.sample)
        cells = _digest_cells(reader, obs.values())
        kinds = {new: obs_kind(reader.obs(old, 0, 1)) for new, old in obs.items()}
        rows = reader.num_rows
        by_column = reader.scan is not None
    facts = {
        "rows": rows, "columns": columns.num_rows, "obs": obs, "kinds": kinds, "by_column": by_column, "notes": notes,
        "size": sum(source_files(source.uri).values()), "stamp": stamp, "cells_sha256": cells,
    }  # fmt: skip
    write_sealed(facts_uri(work, index), facts)
    write_table(part_uri(work, "sources", index), columns)  # written last: it marks the source as done


def _unknown_genes(
    reader: Reader, source: Source, columns: pa.Table, known: identify.GeneLookup, others: Sequence[SpeciesRow],
    *, num_known: int, least: int,
) -> UserError:  # fmt: skip
    """The refusal of a file of which too few genes are known."""
    genes = sum(columns["counted"].to_pylist())
    known_all = num_known == genes
    told = describe_unknown(
        reader, columns, known, map(identify.gene_lookup, others), asked=bool(source.genes),
        known="the file has no others" if known_all else "the known ones are of other biotypes (vocab.biotypes)",
    )  # fmt: skip
    msg = f"{source.uri}: species = {source.species!r}: only {num_known} of {genes} genes are known (qc.min_genes = {least}); {told}"
    return UserError(msg)


OBS_ROWS = 1 << 16
"""Rows of obs that are checked at a time."""


def _digest_cells(reader: Reader, columns: Iterable[str]) -> str:
    """SHA-256 (hex) of the names of all cells and of obs columns, which are read once, so that a damaged one is found now.

    Raises:
        UserError: what cannot be read, before cells of other sources depend on it.
    """
    digest, columns = hashlib.sha256(), sorted(set(columns))
    for start in range(0, reader.num_rows, OBS_ROWS):
        stop = min(start + OBS_ROWS, reader.num_rows)
        _add_values(digest, reader.cell_names(start, stop))
        for name in columns:
            values = reader.obs(name, start, stop)
            if len(values) != stop - start:
                msg = f"{reader.uri}: obs column {name!r} has {start + len(values):,} rows, and there are {reader.num_rows:,} cells: damaged"
                raise UserError(msg)
            _add_values(digest, values)
    return digest.hexdigest()


def _add_values(digest: hashlib._Hash, values: np.ndarray) -> None:
    """Add numbers, or texts and their lengths (-1 = missing), to a hash."""
    if values.dtype.kind in "OU":
        texts = obs_array(values, "str", len(values))
        digest.update(pc.fill_null(pc.binary_length(texts), -1).to_numpy().astype("<i4").tobytes())
        digest.update(texts.buffers()[2] or b"")
    else:
        digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())


def changed_error(uri: str) -> UserError:
    """The refusal of a source that is not what it was."""
    return UserError(
        f"{uri}: has changed since its cells were first read; put the file back, or prepare to another output"
    )


def _require_same(work: str, row_range: RowRange, facts: Mapping[str, Any], block_cells: int) -> None:
    """Raise a `UserError` if a source that was written to since has other content: names, obs, and counts of rows measured before.

    Cells are compared by the facts of pass 1, so nothing needs to be read twice where nothing was written.
    """
    source, index = row_range.source, row_range.index
    with open_source(source) as reader:
        columns = _gene_columns(work, index)
        names = columns["name"].to_pylist()
        read = [source.genes] if source.genes else reader.gene_columns
        same = (
            (reader.num_rows, reader.num_columns) == (facts["rows"], facts["columns"])
            and any(list(reader.gene_names(name)) == names for name in read)
            and _digest_cells(reader, facts["obs"].values()) == facts["cells_sha256"]
        )
        if same and row_range.number >= 0 and files.exists(part_uri(work, "metrics", row_range.number)):
            before, _ = read_metrics(work, [row_range.number])
            blocks = counts.read_blocks(reader, columns, row_range.start, row_range.stop, rows=block_cells)
            same = qc.measure_blocks(blocks, columns)[0].identity == before.identity
        if not same:
            raise changed_error(source.uri)


def _obs_names(reader: Reader, source: Source) -> dict[str, str]:
    """Obs columns to keep: new name to name in the file."""
    kept = source.kept_columns(reader.obs_columns)
    for old in kept:
        if old not in reader.obs_columns:
            raise _no_column(reader, "sources.rename" if old in source.rename else "sources.obs", old)
    return {new: old for old, new in kept.items()}


def _no_column(reader: Reader, field: str, name: str) -> UserError:
    return UserError(
        f"{reader.uri}: {field} = {name!r}: no such column of obs; it has {', '.join(reader.obs_columns) or 'none'}"
    )


def _gene_columns(work: str, index: int) -> pa.Table:
    return read_table(part_uri(work, "sources", index))


def write_row_order(work: str, index: int, source: Source) -> None:
    """Write a column-major source as rows (`cells.row_major`), which the later passes read."""
    with open_source(source) as reader:
        row_major.write_rows(reader, _row_order_folder(work, index))
        write_table(
            part_uri(work, "row_order", index), pa.table({"rows": [reader.num_rows]})
        )  # last: all rows are there


def _row_order_folder(work: str, index: int) -> str:
    return files.join(work, f"row_order-{index:05d}")


@contextmanager
def _open_source(work: str, row_range: RowRange, block_cells: int) -> Iterator[Reader]:
    """Open the source of a row range; a column-major one is read from its rows (`write_row_order`), where they exist.

    Raises:
        UserError: the source is not what it was when its genes, or these rows, were first read.
    """
    source, index = row_range.source, row_range.index
    facts = read_sealed(facts_uri(work, index))
    if "stamp" in facts and files.exists(source.uri) and stamp_of(source.uri) != facts["stamp"]:
        _require_same(work, row_range, facts, block_cells)
    with open_source(source) as reader:
        if reader.scan is not None and files.exists(part_uri(work, "row_order", index)):
            reader.read = partial(row_major.read_rows, _row_order_folder(work, index))
        yield reader


def _copy_uri(work: str, row_range: RowRange) -> str:
    """URI of the packed counts of a row range (`cells.packed_counts`)."""
    return files.join(work, f"counts-{row_range.index:05d}", f"{row_range.start:010d}-{row_range.stop:010d}.arrow")


def _read_counts(work: str, row_range: RowRange, block_cells: int, reader: Reader | None) -> Iterator[counts.Block]:
    """Checked counts of a row range, in blocks: from their packed copy (pass 1 writes it) where it exists, else from the source.

    `reader` is the source, if it is open already.

    Yields:
        Blocks with arrays of their own. Columns are uint16 if the source has at most 65,536.
    """
    columns, start = _gene_columns(work, row_range.index), row_range.start
    for batch in _copied_batches(_copy_uri(work, row_range)):
        yield counts.Block(start, *packed_counts.unpack(batch, columns.num_rows))
        start += batch.num_rows
    if start < row_range.stop:
        yield from _read_source(work, replace(row_range, start=start), columns, block_cells, reader)


def _read_source(
    work: str, row_range: RowRange, columns: pa.Table, block_cells: int, reader: Reader | None
) -> Iterator[counts.Block]:
    """What `_read_counts` yields, from the source, which has these columns."""
    small = packed_counts.column_type(columns.num_rows)
    opened = nullcontext(reader) if reader else _open_source(work, row_range, block_cells)
    with opened as source:
        for b in counts.read_blocks(source, columns, row_range.start, row_range.stop, rows=block_cells):
            data, indices = empty(len(b.data), np.int32), empty(len(b.indices), small)
            data[:], indices[:] = b.data, b.indices
            yield counts.Block(b.start, data, indices, b.indptr)


def _copied_batches(copy: str) -> Iterator[pa.RecordBatch]:
    """Batches of a packed copy, up to the first damaged one; none where there is no copy. The rows after them are read from the source."""
    if not files.exists(copy):
        return
    try:
        yield from read_batches(copy)
    except UserError as error:
        warn(f"{error}. Its counts are read from the source")


def _copied_ranges(work: str, index: int, source: Source, start: int, stop: int) -> list[RowRange]:
    """Rows [start, stop) of a source in row ranges of its packed copies, with the rows between them, which have none."""
    names = files.list_dir(files.join(work, f"counts-{index:05d}"))
    edges = [tuple(map(int, name.removesuffix(".arrow").split("-"))) for name in names]
    found, upto = [], start
    for first, last in [*(edge for edge in edges if edge[0] < stop and edge[1] > start), (stop, stop)]:
        if first > upto:
            found.append(RowRange(number=-1, index=index, source=source, start=upto, stop=first))
        if last > first:
            found.append(RowRange(number=-1, index=index, source=source, start=first, stop=last))
        upto = max(upto, last)
    return found


def _read_rows(
    work: str, row_range: RowRange, block_cells: int, reader: Reader | None = None, wanted_N: np.ndarray | None = None
) -> Iterator[pa.Table]:  # fmt: skip
    """Checked counts of a row range, one table per block.

    Args:
        work: URI of the work folder.
        row_range: rows of one source.
        block_cells: rows of a block.
        reader: the source, if it is open already.
        wanted_N: bool (rows,): the rows that are needed. A packed copy gives few others.

    Yields:
        Tables with `row` (in the file), `columns` and `counts` (lists: a CSR row over the file's columns). Counts are int32,
        columns uint16 or int32.
    """
    if wanted_N is not None:
        columns, start = _gene_columns(work, row_range.index), row_range.start
        for batch in _copied_batches(_copy_uri(work, row_range)):
            table = _wanted_rows(batch, start, columns.num_rows, wanted_N[start - row_range.start :])
            if table is not None:
                yield table
            start += batch.num_rows
        if start == row_range.stop:
            return
        blocks = _read_source(work, replace(row_range, start=start), columns, block_cells, reader)
    else:
        blocks = _read_counts(work, row_range, block_cells, reader)
    for b in blocks:
        yield _rows_table(np.arange(b.start, b.start + len(b.indptr) - 1), b.data, b.indices, b.indptr)


def _wanted_rows(batch: pa.RecordBatch, start: int, num_columns: int, wanted_N: np.ndarray) -> pa.Table | None:
    """Table of `_read_rows` from a batch of packed counts whose first row is `start`; if few of its rows are wanted, of these alone."""
    rows = np.flatnonzero(wanted_N[: batch.num_rows])
    if not len(rows):
        return None
    if 2 * len(rows) > batch.num_rows:
        rows = np.arange(batch.num_rows)
    else:
        batch = batch.take(pa.array(rows))
    return _rows_table(rows + start, *packed_counts.unpack(batch, num_columns))


def _rows_table(rows: np.ndarray, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> pa.Table:
    offsets = pa.array(indptr, pa.int32())
    lists = {
        name: pa.ListArray.from_arrays(offsets, pa.array(values))
        for name, values in (("columns", indices), ("counts", data))
    }
    return pa.table({"row": pa.array(rows, pa.int64()), **lists})


def _with_columns(table: pa.Table, whole: Mapping[str, pa.Array], start: int) -> pa.Table:
    """A table of `_read_rows` with its part of columns that begin with row `start` of the file."""
    first = table["row"][0].as_py() - start
    for name, values in whole.items():
        table = table.append_column(name, values.slice(first, table.num_rows))
    return table


def _csr(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of a table of `_read_rows` as CSR: data, columns and int64 row pointers; read-only."""
    data, indices = (
        column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        for column in (table["counts"], table["columns"])
    )
    return data.values.to_numpy(), indices.values.to_numpy(), data.offsets.to_numpy().astype(np.int64)


# Pass 1: metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsPlan:
    """One part of metrics."""

    work: str
    """URI of the work folder."""
    row_range: RowRange
    """Rows of one source."""
    block_cells: int
    """Rows read at a time."""
    keep_counts: bool
    """Whether to write a packed copy of the counts, which the later passes read instead of the source."""
    near_duplicates: bool = False
    """Whether to write the signatures of `cells.near_duplicates`."""


def read_counts(plan: MetricsPlan) -> Iterator[pa.Table]:
    """Pass 1, read: tables of counts, with the column `sample` if the source has samples."""
    row_range = plan.row_range
    start, stop, whole = row_range.start, row_range.stop, {}
    with _open_source(plan.work, row_range, plan.block_cells) as reader:
        if name := row_range.source.sample:
            whole["sample"] = obs_array(reader.obs(name, start, stop), "str", stop - start)
        for table in _read_rows(plan.work, row_range, plan.block_cells, reader):
            yield _with_columns(table, whole, start)


def measure_counts(tables: Iterator[pa.Table], plan: MetricsPlan) -> Iterator[pa.Table]:
    """Pass 1, transform: metrics of the cells, and their packed counts if these are kept.

    The sum of counts by column over all tables is the list `sums` of the very last row.
    """
    columns = _gene_columns(plan.work, plan.row_range.index)
    masks = qc.gene_masks(columns)
    sums_G = np.zeros(columns.num_rows, dtype=np.int64)
    lists = pa.list_(pa.int64())
    before: pa.Table | None = None
    for table in tables:
        if before is not None:
            yield before.append_column("sums", pa.nulls(len(before), lists))
        rows = _csr(table)
        metrics = qc.cell_metrics(*rows, **masks, sums_G=sums_G)
        before = pa.table({name: getattr(metrics, name) for name in qc.Metrics.__slots__})
        if plan.row_range.source.sample:
            before = before.append_column("sample", pc.fill_null(table["sample"], ""))
        if plan.near_duplicates:
            found_NK = near_duplicates.signatures(*rows, masks["key_G"] * masks["counted_G"])
            near = pa.FixedSizeListArray.from_arrays(pa.array(found_NK.ravel()), near_duplicates.BANDS)
            before = before.append_column("near", near)
        if plan.keep_counts:
            for field, packed in zip(packed_counts.SCHEMA, packed_counts.pack(*rows).columns, strict=True):
                before = before.append_column(field, packed)
    assert before is not None, plan.row_range
    sums = pa.concat_arrays([pa.nulls(len(before) - 1, lists), pa.array([sums_G], lists)])
    yield before.append_column("sums", sums)


def write_metrics(tables: Iterator[pa.Table], plan: MetricsPlan) -> None:
    """Pass 1, write: the packed counts if they are kept, the sums of counts, the signatures if they are made, then the metrics."""
    measured: list[pa.Table] = []

    def packed() -> Iterator[pa.Table]:
        for table in tables:
            measured.append(table.drop_columns(packed_counts.SCHEMA.names))
            yield table.select(packed_counts.SCHEMA.names)

    if plan.keep_counts:
        write_batches(_copy_uri(plan.work, plan.row_range), packed_counts.SCHEMA, packed())
    else:
        measured.extend(tables)
    table = pa.concat_tables(measured).combine_chunks()
    sums = pa.table({"sum": table["sums"][-1].values})
    write_table(part_uri(plan.work, "sums", plan.row_range.number), sums)
    if plan.near_duplicates:
        near_NK = table["near"].combine_chunks().values.to_numpy().reshape(-1, near_duplicates.BANDS)
        near_hashes.write_part(plan.work, plan.row_range.number, near_NK)
        table = table.drop_columns(["near"])
    write_table(part_uri(plan.work, "metrics", plan.row_range.number), table.drop_columns(["sums"]))


measure_cells = Pipeline(
    name="measure_cells",
    source="Cells",
    read=read_counts,
    steps=(measure_counts,),
    write=write_metrics,
    release=identify.forget_lookups,  # of `describe_source`; they would lie in the worker through all passes
)
"""Pass 1: metrics of a row range's cells, their samples, and the sum of counts by column. Takes a `MetricsPlan`."""


def read_metrics(work: str, numbers: list[int]) -> tuple[qc.Metrics, qc.Samples | None]:
    """Metrics, and samples if there are any, of consecutive row ranges."""
    return _as_metrics(pa.concat_tables([read_table(part_uri(work, "metrics", n)) for n in numbers]))


def _as_metrics(table: pa.Table) -> tuple[qc.Metrics, qc.Samples | None]:
    samples = None
    if "sample" in table.column_names:
        coded = table["sample"].combine_chunks().dictionary_encode()
        held = coded.dictionary.to_pylist()
        names = tuple(sorted(held))
        place = {name: i for i, name in enumerate(names)}
        samples = qc.Samples(np.array([place[n] for n in held], np.int32)[coded.indices.to_numpy()], names)
    return qc.Metrics(*(table[name].to_numpy() for name in qc.Metrics.__slots__)), samples


GROUP_SOURCES, GROUP_CELLS = 64, 200_000
"""Most sources, and cells of several sources, whose metrics stand in one file for the process that runs the stage."""
_GROUPED = pa.schema([
    ("n_counts", pa.int64()), ("n_genes", pa.int32()), ("n_mito", pa.int64()), ("hash_a", pa.uint64()), ("hash_b", pa.uint64()),
    ("sample", pa.string()),
])  # fmt: skip


def group_ranges(units: Iterable[RowRange]) -> list[list[list[RowRange]]]:
    """Row ranges by source, sources in groups. A source of more than `GROUP_CELLS` cells is alone."""
    groups: list[list[list[RowRange]]] = []
    free = 0
    for _, ranges in groupby(units, key=lambda unit: unit.index):
        mine = list(ranges)
        cells = sum(unit.stop - unit.start for unit in mine)
        if not groups or cells > free or len(groups[-1]) == GROUP_SOURCES:
            groups.append([])
            free = GROUP_CELLS
        groups[-1].append(mine)
        free -= cells
    return groups


def group_metrics(work: str, group: int, numbers: Sequence[int]) -> None:
    """Write the metrics of row ranges as one file, so that the process that runs the stage reads few."""

    def read(number: int) -> pa.Table:
        table = read_table(part_uri(work, "metrics", number))
        if "sample" not in table.column_names:
            table = table.append_column("sample", pa.nulls(table.num_rows, pa.string()))
        return table.select(_GROUPED.names).cast(_GROUPED)

    write_tables(part_uri(work, "group_metrics", group), _GROUPED, files.map_reads(work, read, numbers))


def read_group(
    work: str, group: int, sources: Sequence[Sequence[RowRange]]
) -> Iterator[tuple[qc.Metrics, qc.Samples | None]]:
    """What `read_metrics` gives for each source of a group, whose file is there if it has several."""
    if len(sources) == 1:
        yield read_metrics(work, [unit.number for unit in sources[0]])
        return
    table = read_table(part_uri(work, "group_metrics", group))
    start = 0
    for mine in sources:
        num = sum(unit.stop - unit.start for unit in mine)
        part = table.slice(start, num)
        yield _as_metrics(part if mine[0].source.sample else part.drop_columns(["sample"]))
        start += num


def find_doublets(
    work: str, name: str, source: Source, index: int, calls: list[np.ndarray], *, block_cells: int, rate: float, seed: int
) -> None:  # fmt: skip
    """Find doublets by Scrublet in a group of calls of one source (`doublets.plan_calls`); their counts are in memory.

    Args:
        work: URI of the work folder.
        name: name of the part file to write.
        source: the source.
        index: its number.
        calls: rows of the cells of each call, ascending.
        block_cells: rows read at a time.
        rate: expected doublet rate.
        seed: of the simulated doublets.
    """
    columns = _gene_columns(work, index)
    rows = np.sort(np.concatenate(calls))
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    wanted_N = np.zeros(int(rows[-1]) + 1, dtype=bool)
    wanted_N[rows] = True
    for row_range in _copied_ranges(work, index, source, int(rows[0]), len(wanted_N)):
        if not wanted_N[row_range.start : row_range.stop].any():
            continue
        for b in _read_counts(work, row_range, block_cells, None):
            keep = np.zeros(len(b.indptr) - 1, dtype=bool)
            asked = wanted_N[b.start : b.start + len(keep)]  # a copy may hold rows beyond the last one
            keep[: len(asked)] = asked
            entries = np.repeat(keep, np.diff(b.indptr))
            parts.append((b.data[entries], b.indices[entries].astype(np.int32), np.diff(b.indptr)[keep]))
    data, indices, lengths = (np.concatenate(p) for p in zip(*parts, strict=True))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    found = []
    for mine in calls:
        entries_E, indptr_M1 = _entries(indptr, np.searchsorted(rows, mine))
        score, verdict = scrublet(
            data[entries_E], indices[entries_E], indptr_M1, columns.num_rows, rate=rate, seed=seed
        )
        found.append(pa.table({"row": mine, "score": score, "doublet": verdict}))
    write_table(part_uri(work, "doublets", name), pa.concat_tables(found).combine_chunks())


def _entries(indptr: np.ndarray, rows_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the entries of some rows of a CSR matrix, and the pointers of these rows alone."""
    lengths = np.diff(indptr)[rows_M]
    indptr_M1 = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(indptr_M1[-1]) + np.repeat(indptr[rows_M] - indptr_M1[:-1], lengths), indptr_M1


# Pass 2: medians


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SketchPlan:
    """One median sketch."""

    work: str
    """URI of the work folder."""
    number: int
    """Of the sketch."""
    parts: list[tuple[RowRange, np.ndarray]]
    """Row ranges of one species, each with bool (rows,): which cells are kept; at least one of each."""
    block_cells: int
    """Rows read at a time."""
    sampled: bool = False
    """Whether the cells are a sample of the kept ones. Then the sketch has one more gene, with a count of one in each cell."""


def read_kept(plan: SketchPlan) -> Iterator[pa.Table]:
    """Pass 2, read: tables of counts with kept cells, and `part`, the place in `plan.parts`."""
    wide = max(_gene_columns(plan.work, index).num_rows for index in {r.index for r, _ in plan.parts}) > 1 << 16
    for k, (row_range, keep_N) in enumerate(plan.parts):
        for table in _read_rows(plan.work, row_range, plan.block_cells, wanted_N=keep_N):
            if keep_N[table["row"].to_numpy() - row_range.start].any():
                # one type in all tables
                columns = table["columns"].cast(packed_counts.INT32S) if wide else table["columns"]
                part = pa.array([k] * len(table), pa.int32())
                yield table.set_column(1, "columns", columns).append_column("part", part)


def sketch_counts(tables: Iterator[pa.Table], plan: SketchPlan) -> Iterator[pa.Table]:
    """Pass 2, transform: the sketch of all cells, over the genes of `source_genes.merge_genes`, as one row of `packed_counts`."""
    listed = read_table(part_uri(plan.work, "genes", plan.parts[0][0].source.species))["gene"].combine_chunks()
    filled = medians.SketchBuilder(len(listed) + plan.sampled)
    for part, own in groupby(tables, key=lambda table: table["part"][0].as_py()):
        row_range, keep_N = plan.parts[part]
        depth = read_metrics(plan.work, [row_range.number])[0].n_counts
        columns = _gene_columns(plan.work, row_range.index)
        gene_G = pc.index_in(columns["gene"].combine_chunks(), value_set=listed)
        gene_G = np.where(columns["candidate"].to_numpy(), pc.fill_null(gene_G, -1).to_numpy(), -1).astype(np.int32)
        for table in own:
            rows = table["row"].to_numpy() - row_range.start
            of = {"depth_N": depth[rows], "keep_N": keep_N[rows]}
            filled.update(*_csr(table), gene_G=gene_G, **of)
            if plan.sampled:
                ones, ends = np.ones(len(rows), np.int32), np.arange(len(rows) + 1)
                filled.update(ones, np.zeros_like(ones), ends, gene_G=np.array([len(listed)], np.int32), **of)
    found = filled.finish()
    del filled  # its lists are larger than the sketch
    packed = _pack_sketch(found)
    del found
    yield packed


def write_sketch_part(tables: Iterator[pa.Table], plan: SketchPlan) -> None:
    """Pass 2, write: the sketch."""
    write_batches(sketch_uri(plan.work, "sketch", plan.number), packed_counts.SCHEMA, tables)


sketch_medians = Pipeline(
    name="sketch_medians", source="Counts", read=read_kept, steps=(sketch_counts,), write=write_sketch_part
)
"""Pass 2: the median sketch of the kept cells of some row ranges. Takes a `SketchPlan`."""


def sketch_uri(work: str, kind: str, number: int) -> str:
    """URI of a sketch's part file."""
    return files.join(work, kind, f"{number:05d}.arrow")


def _pack_sketch(found: medians.Sketch) -> pa.Table:
    return packed_counts.pack(found.counts, found.keys, np.array([0, len(found.keys)]))


def write_sketch(uri: str, found: medians.Sketch) -> None:
    """Write a sketch as a part file."""
    write_batches(uri, packed_counts.SCHEMA, [_pack_sketch(found)])


def merge_sketch_parts(uris: list[str], to: str) -> None:
    """Merge the sketches of several part files, one at a time, into one part file."""
    write_sketch(to, medians.merge_sketches(read_sketch(uri) for uri in uris))


def read_sketch(uri: str) -> medians.Sketch:
    """Read a sketch from its part file."""
    (batch,) = read_batches(uri)
    num, keys, _ = packed_counts.unpack(batch, np.iinfo(np.int32).max)
    return medians.Sketch(keys.view(np.uint32), num.view(np.uint32))


# Pass 3: sentences


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardPlan:
    """One shard of sentences: what is read, how it is encoded, and where it is written."""

    work: str
    """URI of the work folder."""
    row_range: RowRange
    """Rows of one source."""
    keep_N: np.ndarray
    """bool, which rows are kept; at least one."""
    shard: int
    """Number of the shard."""
    to: str
    """URI of the folder of shards."""
    vocabulary: str
    """URI of the vocabulary's file."""
    digest: str
    """Hash of the vocabulary."""
    tokens: Tokens
    """Settings of the encoding."""
    obs: dict[str, str]
    """Kind (`str`, `float`, `int`) of every obs column of the corpus; null where a source lacks one."""
    block_cells: int
    """Rows read at a time."""
    doublets: tuple[str, ...] | None = None
    """Names of the parts of doublets that have some of the rows; None = doublets are not looked for."""
    near: str = ""
    """URI of the folder of signatures (`near_hashes`); empty = there are none."""

    @property
    def schema(self) -> pa.Schema:
        """Columns of the shard."""
        return sentence_schema(self.obs, doublets=self.doublets is not None)


def read_cells(plan: ShardPlan) -> Iterator[pa.Table]:
    """Pass 3, read: tables of counts with cell names (`cell`) and obs, for the blocks with kept cells."""
    row_range, source = plan.row_range, plan.row_range.source
    start, stop = row_range.start, row_range.stop
    held = read_sealed(facts_uri(plan.work, row_range.index))["obs"]
    with _open_source(plan.work, row_range, plan.block_cells) as reader:
        names = pa.array(reader.cell_names(start, stop), pa.string())
        whole = {"cell": pc.binary_join_element_wise(source.name, names, ":")}
        for name, kind in plan.obs.items():
            values = reader.obs(held[name], start, stop) if name in held else None
            whole[name] = obs_array(values, kind, stop - start)
        for table in _read_rows(plan.work, row_range, plan.block_cells, reader):
            first = table["row"][0].as_py() - start
            if plan.keep_N[first : first + len(table)].any():
                yield _with_columns(table, whole, start)


def encode_cells(tables: Iterator[pa.Table], plan: ShardPlan) -> Iterator[pa.Table]:
    """Pass 3, transform: counts of cells to sentences of the kept ones; columns are those of the shard."""
    row_range, tokens = plan.row_range, plan.tokens
    columns, source = _gene_columns(plan.work, row_range.index), row_range.source
    ranks = _ranks(plan.vocabulary, plan.digest, source.species, tokens.scaling)
    position_G = ranks.genes.positions(columns["gene"].combine_chunks())
    encoder = rank_value.Encoder(ranks, np.where(identify.is_first(columns), position_G, -1).astype(np.int32), tokens)
    metrics, _ = read_metrics(plan.work, [row_range.number])
    mito_N = metrics.mito_fraction
    doublets = None if plan.doublets is None else _read_doublets(plan.work, plan.doublets, row_range)
    length_N = np.minimum(metrics.n_genes, tokens.max_len - int(tokens.cls)) + int(tokens.cls)
    for table in tables:
        place_N = table["row"].to_numpy() - row_range.start
        kept_K = np.flatnonzero(plan.keep_N[place_N])
        place_K, cells = place_N[kept_K], table.select(["row", "cell", *plan.obs]).take(pa.array(kept_K))
        data, indices, indptr = _csr(table)
        out = empty(len(data) + len(kept_K), np.int32)
        tokens_T, offsets_K1 = encoder(data, indices, indptr, rows_N=kept_K, out=out)
        length_K = np.diff(offsets_K1)
        assert np.array_equal(length_K, length_N[place_K]), "lengths differ from those of pass 1"
        assert length_K.min() > int(tokens.cls), "a kept cell without vocabulary genes"
        sentences = pa.ListArray.from_arrays(pa.array(offsets_K1, pa.int32()), pa.array(tokens_T), SENTENCES.type)
        computed = {
            "cell": cells["cell"],
            "species": pa.array([source.species] * len(kept_K), pa.string()),
            "source": pa.array([source.name] * len(kept_K), pa.string()),
            "source_row": cells["row"],
            "length": pa.array(length_K, pa.int32()),
            "n_counts": pa.array(metrics.n_counts[place_K], pa.int64()),
            "n_genes": pa.array(metrics.n_genes[place_K], pa.int32()),
            "mito_fraction": pa.array(mito_N[place_K], pa.float64()),
        }
        if doublets is not None:
            computed |= {name: doublets[name].take(pa.array(place_K)) for name in DOUBLET_COLUMNS}
        rest = [*computed.values(), *(cells[name] for name in plan.obs)]
        yield pa.Table.from_arrays([sentences, *rest], schema=plan.schema)


def _read_doublets(work: str, parts: tuple[str, ...], row_range: RowRange) -> pa.Table:
    """Columns `DOUBLET_COLUMNS` of the cells of a row range."""
    num = row_range.stop - row_range.start
    score_N, scored_N, called_N = np.zeros(num), np.zeros(num, dtype=bool), np.zeros(num, dtype=bool)
    for part in parts:
        table = read_table(part_uri(work, "doublets", part))
        rows = table["row"].to_numpy() - row_range.start
        mine = (rows >= 0) & (rows < num)
        score_N[rows[mine]], scored_N[rows[mine]] = table["score"].to_numpy()[mine], True
        called_N[rows[mine]] = table["doublet"].to_numpy()[mine]
    return pa.table([pa.array(score_N, mask=~scored_N), pa.array(called_N)], names=list(DOUBLET_COLUMNS))


def write_sentences(tables: Iterator[pa.Table], plan: ShardPlan) -> None:
    """Pass 3, write: signatures of the cells if there are some, the shard, then its information to the work folder."""
    if plan.near:
        near_hashes.write_shard(plan.near, plan.work, plan.row_range.number, plan.shard, plan.keep_N)
    shards.write_sentences(tables, plan.schema, to=plan.to, work=plan.work, shard=plan.shard)


encode_shard = Pipeline(
    name="encode_shard", source="Cells", read=read_cells, steps=(encode_cells,), write=write_sentences
)
"""Pass 3: the sentences of a row range's kept cells as a shard. Takes a `ShardPlan`."""


@lru_cache(maxsize=8)
def _ranks(vocabulary: str, digest: str, species: str, scaling: str) -> rank_value.Ranks:
    """Rank table of a vocabulary file, cached per process; the hash tells apart former contents of the same file."""
    found = Vocabulary.load(vocabulary)
    assert found.hash == digest, vocabulary
    return rank_value.Ranks.of(found.species_genes(species), scaling)
