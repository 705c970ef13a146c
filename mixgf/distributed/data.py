"""Cells as Ray Data: data sets of count files and of corpora, and the row passes of a stage as pipelines.

    read_cells(sources)     raw counts of any files that `prepare` reads, one row per cell     operator ReadCells
    read_corpus(uri)        sentences and obs of a finished corpus, one row per cell           operator ReadCorpus
    run_pipeline(tasks)     tasks of a `mixgf.execution.Pipeline`: read, transform, write      operators fused into one

`run_pipeline` makes one part file per task. A part depends on its task alone and is written atomically under its own name.
So a task that runs twice writes the same bytes to the same place. Only receipts leave the workers.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# before ray.data is imported: with the prefetch thread, the end of a data set is noticed 0.2 s late
os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray import cloudpickle
from ray.data import DataContext, Dataset, Datasource, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from mixgf.cells import counts
from mixgf.cells.open import open_reader
from mixgf.cells.sources import expand_sources
from mixgf.config.data import Source, SpeciesRow
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.corpus.shards import OBS_TYPES, merge_kinds, obs_array, obs_kind
from mixgf.errors import UserError
from mixgf.execution import Pipeline, Receipt, Receipts, Task
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


# data sources: work that is cut into pieces of known size


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What one read task reads."""

    read: Callable[[], Iterable[pa.Table]]
    rows: int
    uri: str | None = None
    num_bytes: int = 0
    """Estimate of the rows in memory, by which Ray Data plans."""


class _Pieces(Datasource):  # type: ignore[misc]
    """One read task per piece; `name` is shown by Ray Data as `ReadNAME`."""

    def __init__(self, name: str, pieces: Sequence[_Piece], schema: pa.Schema | None = None) -> None:
        super().__init__()
        self._name, self._pieces, self._schema = name, list(pieces), schema

    def get_name(self) -> str:
        """Name of the operator, without `Read`."""
        return self._name

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows."""
        return sum(piece.num_bytes for piece in self._pieces)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task per piece; a piece is not cut further, whatever `parallelism` says."""
        del parallelism, data_context
        return [
            ReadTask(
                piece.read,
                BlockMetadata(
                    num_rows=piece.rows,
                    size_bytes=piece.num_bytes,
                    input_files=[piece.uri] if piece.uri else None,
                    exec_stats=None,
                ),
                schema=self._schema,
                per_task_row_limit=per_task_row_limit,
            )
            for piece in self._pieces
        ]


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
        _Piece(
            read=partial(_read_shard, corpus.shard_uri(i), names), rows=int(corpus.shard_rows[i]),
            uri=corpus.shard_uri(i), num_bytes=int(corpus.lengths_N[corpus.starts[i] : corpus.starts[i + 1]].sum()) * 4,
        )
        for i in range(len(corpus.shards))
    ]  # fmt: skip
    return _dataset(_Pieces("Corpus", pieces, schema))


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
        _Piece(
            read=partial(_read_cells, source, rows[source.species], start, min(start + block_cells, num), wanted),
            rows=min(start + block_cells, num) - start, uri=source.uri,
            num_bytes=(min(start + block_cells, num) - start) * 16_000,
        )
        for source, num in zip(expanded, sizes, strict=True)
        for start in range(0, num, block_cells)
    ]  # fmt: skip
    schema = pa.schema([*CELLS, *((name, OBS_TYPES[kind]) for name, kind in wanted.items())])
    return _dataset(_Pieces("Cells", pieces, schema))


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


def _dataset(source: _Pieces, **options: Any) -> Dataset:
    """A data set with one block per piece."""
    return ray.data.read_datasource(source, override_num_blocks=max(1, len(source._pieces)), **options)


# row passes of a stage

_TASK, _ERROR, _RESULT = "__task", "__error", "__result"


def pipeline_dataset(tasks: Sequence[Task], *, cpus: float, in_flight: int) -> Dataset:
    """The data set of receipts that `run_pipeline` consumes: one row (`__task`, `__error`, `__result`) per task.

    Read, transform and write ask for the same resources and no concurrency of their own, so that Ray Data fuses them into
    one operator: rows stay in the process that read them.
    """
    pipeline = tasks[0].function
    assert isinstance(pipeline, Pipeline)
    assert all(task.function is pipeline for task in tasks), "one pass at a time"
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = DataContext.get_current().copy()
    own.enable_progress_bars = own.print_on_execution_start = False
    own.target_max_block_size = None  # one block per task: a shard of more than 128 MB is not cut
    own.execution_options.preserve_order = False
    own.execution_options.resource_limits = ExecutionResources(cpu=cpus * in_flight)
    own.execution_no_progress_timeout_s = -1  # a large column-major file takes longer than Ray's 30 minutes
    own.retried_map_errors, own.max_map_retries = ["StorageError", "OSError"], 3  # the whole task again
    own.raise_original_map_exception = True
    retries = {"max_retries": 3}  # of a lost worker; Ray Data's own number is infinite
    pieces = [
        _Piece(
            read=partial(_read_task, number, task), rows=max(1, int(task.weight)), num_bytes=int(task.weight) * 16_000
        )
        for number, task in enumerate(tasks)
    ]
    with DataContext.current(own), warnings.catch_warnings():
        # a read takes `max_retries` only in this way
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        data = _dataset(_Pieces(pipeline.source, pieces), num_cpus=cpus, ray_remote_args=retries)
        for step in (*pipeline.steps, pipeline.write):
            function = _writing(step) if step is pipeline.write else _transforming(step)
            data = data.map_batches(
                function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=cpus, **retries
            )
    return data


def run_pipeline(tasks: Sequence[Task], *, cpus: float, in_flight: int) -> Receipts:
    """Run the tasks of one `Pipeline` by Ray Data; yields receipts as parts are written.

    A lost worker or node, and an error of storage, repeats the task. A `UserError` becomes the receipt's error. Any other
    error is raised as the task raised it.

    Args:
        tasks: of one pipeline.
        cpus: CPUs of a task.
        in_flight: most tasks at a time.
    """
    data = pipeline_dataset(tasks, cpus=cpus, in_flight=in_flight)
    try:
        with closing(_receipts(data)) as receipts:
            yield from receipts
    except ray.exceptions.RayError as error:
        raise _cause(error) from None


def _receipts(data: Dataset) -> Receipts:
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            result = None if row[_RESULT] is None else cloudpickle.loads(row[_RESULT])
            yield Receipt(row[_TASK], row[_ERROR] or "", result)


def _cause(error: BaseException) -> BaseException:
    """The error that a task raised, without Ray's and Ray Data's wrappers."""
    while isinstance(error, ray.exceptions.RayError) and (inner := getattr(error, "cause", None) or error.__cause__):
        error = inner
    return error


def _read_task(number: int, task: Task) -> Iterator[pa.Table]:
    """Rows of one task, and the task itself in the first row of column `__task`, for the operators that follow."""
    pipeline = task.function
    assert isinstance(pipeline, Pipeline)
    sent = cloudpickle.dumps((number, task))
    yield from _guarded(sent, lambda: pipeline.read(*task.arguments(), **task.kwargs))


def _guarded(sent: bytes, rows: Callable[[], Iterable[pa.Table]]) -> list[pa.Table]:
    """Tables of a step with the task in their first row; a `UserError` is one row with the error instead of the rows."""
    try:
        tables = [table for table in rows() if table.num_rows]
    except UserError as error:
        return [pa.table({_TASK: pa.array([sent], pa.binary()), _ERROR: pa.array([str(error)], pa.string())})]
    assert tables, "a step without rows"
    marked = []
    for i, table in enumerate(tables):
        first = pa.array([sent if i == 0 else None], pa.binary())
        column = pa.concat_arrays([first, pa.nulls(table.num_rows - 1, pa.binary())])
        marked.append(table.add_column(0, _TASK, column))
    return marked


def _transforming(step: Callable[..., Iterator[pa.Table]]) -> Callable[[pa.Table], Iterator[pa.Table]]:
    def transform(block: pa.Table) -> Iterator[pa.Table]:
        if _ERROR in block.column_names:
            yield block
            return
        sent, tables = _unmarked(block)
        _, task = cloudpickle.loads(sent)
        yield from _guarded(sent, lambda: step(tables, *task.arguments(), **task.kwargs))

    transform.__name__ = step.__name__
    return transform


def _writing(step: Callable[..., Any]) -> Callable[[pa.Table], pa.Table]:
    def write(block: pa.Table) -> pa.Table:
        result = error = None
        if _ERROR in block.column_names:
            number, _ = cloudpickle.loads(block[_TASK][0].as_py())
            error = block[_ERROR][0].as_py()
        else:
            sent, tables = _unmarked(block)
            number, task = cloudpickle.loads(sent)
            try:
                result = cloudpickle.dumps(step(tables, *task.arguments(), **task.kwargs))
            except UserError as found:
                error = str(found)
        return pa.table(
            [pa.array([number], pa.int32()), pa.array([error], pa.string()), pa.array([result], pa.binary())],
            names=[_TASK, _ERROR, _RESULT],
        )

    write.__name__ = step.__name__
    return write


def _unmarked(block: pa.Table) -> tuple[bytes, Iterator[pa.Table]]:
    """The pickled task of a block, and its tables as they were yielded."""
    sent = block[_TASK][0].as_py()
    return sent, (pa.Table.from_batches([batch]) for batch in block.drop_columns([_TASK]).to_batches())
