"""The row passes of a stage as Ray Data pipelines: tasks of a `mixgf.execution.Pipeline` as read, transform and write.

`run_pipeline` makes one part file per task. A part depends on its task alone and is written atomically under its own name.
So a task that runs twice writes the same bytes to the same place. Only receipts leave the workers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle
from ray.data import DataContext, Dataset, ExecutionResources

from mixgf.distributed.datasource import Piece, Pieces, dataset
from mixgf.errors import UserError
from mixgf.execution import Pipeline, Receipt, Receipts, Task

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
        Piece(
            read=partial(_read_task, number, task), rows=max(1, int(task.weight)), num_bytes=int(task.weight) * 16_000
        )
        for number, task in enumerate(tasks)
    ]
    with DataContext.current(own), warnings.catch_warnings():
        # a read takes `max_retries` only in this way
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        data = dataset(Pieces(pipeline.source, pieces), num_cpus=cpus, ray_remote_args=retries)
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
