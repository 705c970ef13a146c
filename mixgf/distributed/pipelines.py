"""The row passes of a stage as Ray Data pipelines: tasks of a `mixgf.execution.Pipeline` as read, transform and write.

`run_pipeline` makes one part file per task. A part depends on its task alone and is written atomically under its own name.
So a task that runs twice writes the same bytes to the same place. Only receipts leave the workers.

All operators of a pass are fused: one Ray task reads, transforms and writes one part. Rows flow through it block by block,
of about `BLOCK_BYTES`. Read and transform mark their first and last row of a task, so that the next operator knows where
one ends. Ray Data calls a function of `map_batches` once per block, but a step is a function of all blocks of its task.
So each step runs in a greenlet, which waits for the next block (`_Step`). A task that ends early, by an error or a
cancellation, ends its steps: nothing is written.

Ray gives each task with a GPU a process of its own, which would load a model and start CUDA for each part. So a pass with GPUs
runs in a pool of actors. Its last operator is a class, and Ray Data fuses the others into it.

A task that ends its worker again and again is not run once more. It gets a `lost` receipt instead, and the others go on.

Other forms, at shards of 10,000 cells: one block per task holds a whole shard's counts (0.70 GB per worker against 0.53).
Threads instead of greenlets hold 50 MB more, in memory pools of their own. A `Datasink` gets an iterator, but tells the
driver nothing before the last task ends, and Ray Data calls every one `Write`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from greenlet import getcurrent, greenlet
from ray import cloudpickle
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionResources

from mixgf.distributed.datasource import Piece, Pieces, dataset
from mixgf.execution import Pipeline, Receipt, Receipts, Task, error_of

_TASK, _END, _ERROR, _RESULT = "__task", "__end", "__error", "__result"
BLOCK_BYTES = 4 << 20
"""Rows that an operator gives to the next one: smaller tables are put together, larger ones are cut."""


RETRIES = 3
"""Times that a task runs again: after an error of storage, and after the loss of its worker or node."""
LOST = f"it ended its worker each of the {RETRIES + 1} times it ran"


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What each task of a pass needs, and how many run at a time."""

    cpus: float = 1.0
    gpus: float = 0.0
    """Below 1: a share of one."""
    in_flight: int = 1
    """Most tasks at a time; with GPUs, the actors that are asked for."""
    min_actors: int = 1
    """Fewest actors, with GPUs."""


def pipeline_dataset(tasks: Sequence[Task], needs: Needs) -> Dataset:
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
    own.target_max_block_size = BLOCK_BYTES
    own.execution_options.preserve_order = False
    limits = {"cpu": needs.cpus * needs.in_flight} | ({"gpu": needs.gpus * needs.in_flight} if needs.gpus else {})
    own.execution_options.resource_limits = ExecutionResources.for_limits(**limits)
    own.execution_no_progress_timeout_s = -1  # a large column-major file takes longer than Ray's 30 minutes
    own.retried_map_errors, own.max_map_retries = ["StorageError", "OSError"], RETRIES  # the whole task again
    own.raise_original_map_exception = True
    resources: dict[str, Any] = {"num_cpus": needs.cpus}
    last: dict[str, Any] = {}
    if needs.gpus:
        actors = min(needs.in_flight, len(tasks))
        # an actor gets one task at a time: if a task ends it, no other one loses a retry
        last["compute"] = ActorPoolStrategy(
            min_size=min(needs.min_actors, actors),
            max_size=actors,
            initial_size=actors,
            max_tasks_in_flight_per_actor=1,
        )
        resources["num_gpus"] = needs.gpus  # Ray Data restarts actors, and repeats their tasks, without end
    else:
        resources["max_retries"] = RETRIES + 1  # the last one only tells (`_Read`)
    pieces = [
        Piece(read=_Read(number, task), rows=max(1, int(task.weight)), num_bytes=int(task.weight) * 16_000)
        for number, task in enumerate(tasks)
    ]
    with DataContext.current(own), warnings.catch_warnings():
        # a read takes all options only in this way
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        data = dataset(Pieces(pipeline.source, pieces), ray_remote_args=resources)
        for step in pipeline.steps:
            data = _mapped(data, _transforming(step), **resources)
        write = _writing(pipeline.write)
        whole = _mapped(data, _as_class(write) if needs.gpus else write, **resources, **last)
        whole.set_name(pipeline.name)  # in Ray's dashboard
        return whole


def _mapped(data: Dataset, function: Callable[[pa.Table], Iterator[pa.Table]] | type, **options: Any) -> Dataset:
    # `map_batches` wants a batch size where GPUs are asked for; a batch here is a block, and a step chooses its own batches
    return data.map_batches_internal(function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **options)


def _as_class(function: Callable[[pa.Table], Iterator[pa.Table]]) -> type:
    """A function of blocks as a class for Ray Data, under the same name."""

    def call(self: object, block: pa.Table) -> Iterator[pa.Table]:
        return function(block)

    return type(function.__name__, (), {"__call__": call})


def run_pipeline(tasks: Sequence[Task], needs: Needs) -> Receipts:
    """Run the tasks of one `Pipeline` by Ray Data; yields receipts as parts are written.

    A lost worker or node, and an error of storage, repeats the task. An error that is the source's (`execution.error_of`)
    becomes the receipt's error. Any other error is raised as the task raised it.

    Args:
        tasks: of one pipeline.
        needs: of each task.
    """
    data = pipeline_dataset(tasks, needs)
    number = 0
    try:
        with closing(_receipts(data)) as receipts:
            for receipt in receipts:
                number += 1
                yield receipt
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    if number != len(tasks):
        msg = f"{number} receipts of {len(tasks)} tasks"
        raise RuntimeError(msg)


def _receipts(data: Dataset) -> Receipts:
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            result = None if row[_RESULT] is None else cloudpickle.loads(row[_RESULT])
            error = row[_ERROR] or ""
            yield Receipt(row[_TASK], error=error, result=result, lost=error == LOST)


def _cause(error: BaseException) -> BaseException:
    """The error that a task raised, without Ray's and Ray Data's wrappers."""
    while isinstance(error, ray.exceptions.RayError) and (inner := getattr(error, "cause", None) or error.__cause__):
        error = inner
    return error


# operators


class _Outgoing:
    """Tables of one task on their way to the next operator: the first row carries the task, the last one its end.

    Args:
        sent: number and task, pickled.
    """

    def __init__(self, sent: bytes) -> None:
        self._sent: bytes | None = sent
        self._held: pa.Table | None = None

    def add(self, table: pa.Table) -> Iterator[pa.Table]:
        """Hold the table back, since it may be the last one; yields the one before it."""
        if table.num_rows:
            held, self._held = self._held, table
            if held is not None:
                yield self._marked(held, None)

    def end(self, error: str = "") -> Iterator[pa.Table]:
        """Yield the last table, or a row without columns if there is none, with the task's error; empty = none."""
        assert error or self._held is not None, "a step without rows"
        yield self._marked(self._held, error)

    def _marked(self, table: pa.Table | None, end: str | None) -> pa.Table:
        num = 1 if table is None else table.num_rows
        sent, self._sent = self._sent, None
        begins = pa.concat_arrays([pa.array([sent], pa.binary()), pa.nulls(num - 1, pa.binary())])
        ends = pa.concat_arrays([pa.nulls(num - 1, pa.string()), pa.array([end], pa.string())])
        if table is None:
            return pa.table({_TASK: begins, _END: ends})
        return table.append_column(_TASK, begins).append_column(_END, ends)


class _Incoming:
    """A block of an operator, without its marks."""

    def __init__(self, block: pa.Table) -> None:
        self.begin: bytes | None = block[_TASK][0].as_py()
        """The task, in its first block."""
        self.end: str | None = block[_END][-1].as_py()
        """Error of the task, empty = none, in its last block."""
        self._block = block.drop_columns([_TASK, _END])

    def tables(self) -> Iterator[pa.Table]:
        """Its tables as the step before yielded them."""
        return (pa.Table.from_batches([batch]) for batch in self._block.to_batches() if self._block.num_columns)


class _Read:
    """Gives the rows of one task."""

    def __init__(self, number: int, task: Task) -> None:
        self._number, self._task = number, task

    def __call__(self) -> Iterator[pa.Table]:
        pa.set_memory_pool(pa.system_memory_pool())  # pyarrow's own one keeps about 40 MB more of what was freed
        pa.default_memory_pool().release_unused()  # what earlier tasks of this process freed
        pipeline, task = self._task.function, self._task
        assert isinstance(pipeline, Pipeline)
        if pipeline.release is not None:
            pipeline.release()
        out = _Outgoing(cloudpickle.dumps((self._number, task)))
        error = ""
        if _losses() > RETRIES:
            yield from out.end(LOST)
            return
        try:
            for table in pipeline.read(*task.arguments(), **task.kwargs):
                yield from out.add(table)
        except Exception as found:  # noqa: BLE001 (raised again unless it is the source's)
            error = error_of(task, found)
        yield from out.end(error)


def _losses() -> int:
    """How often Ray has run the current task before and lost its worker. Ray has no public name for it."""
    worker = ray._private.worker.global_worker
    return int(worker.core_worker.get_current_task_attempt_number()) if worker.connected else 0


_NEXT, _OVER = object(), object()


class _Step:
    """A step of one task: a function of an iterator of tables, which gets them one by one.

    It runs in a greenlet, which stops where the step asks for its next table. If the `_Step` goes before the step has ended,
    `greenlet.GreenletExit` is raised there, so that files that the step writes are closed and removed.

    Args:
        function: called with the iterator; returns what it makes.
    """

    def __init__(self, function: Callable[[Iterator[pa.Table]], Iterable[Any]]) -> None:
        self._greenlet = greenlet(_run)
        self._function = function

    def feed(self, table: pa.Table | None) -> Iterator[Any]:
        """Give the next table, or None after the last; yields what the step makes until it asks for another one or ends."""
        if not self._greenlet:  # not started
            yield from self._resume(self._function)
        yield from self._resume(table)

    def _resume(self, given: Any) -> Iterator[Any]:
        made = _OVER if self._greenlet.dead else self._greenlet.switch(given)
        while made is not _NEXT and made is not _OVER:
            yield made
            made = self._greenlet.switch()


def _run(function: Callable[[Iterator[pa.Table]], Iterable[Any]]) -> object:
    """What the greenlet of a `_Step` does: give to its parent what the function makes, and take tables from it."""
    feeder = getcurrent().parent
    assert feeder is not None

    def tables() -> Iterator[pa.Table]:
        while (table := feeder.switch(_NEXT)) is not None:
            yield table
            del table

    for made in function(tables()):
        feeder.switch(made)
        del made
    return _OVER


class _Operator:
    """A step of a pipeline as a function of blocks, in the order in which one Ray task reads them.

    Args:
        function: of the pipeline; called with the tables and the task's arguments, it returns what it makes.
        outgoing: what that is put into.
    """

    def __init__(
        self, function: Callable[..., Iterable[Any]], outgoing: Callable[[bytes], _Outgoing | _Outcome]
    ) -> None:
        self._function, self._outgoing = function, outgoing
        self._step: _Step | None = None
        self._out: _Outgoing | _Outcome | None = None
        self._task: Task | None = None

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        incoming = _Incoming(block)
        if incoming.begin is not None:
            _, self._task = cloudpickle.loads(incoming.begin)
            arguments = partial(self._function, task=self._task)
            self._step, self._out = _Step(arguments), self._outgoing(incoming.begin)
        if self._out is None:
            msg = "a block in the middle of a task came first: Ray Data has not fused the operators"
            raise RuntimeError(msg)
        if self._step is None:
            return  # of a task that has ended with an error
        try:
            for table in incoming.tables():
                for made in self._step.feed(table):
                    yield from self._out.add(made)
            if incoming.end == "":
                for made in self._step.feed(None):
                    yield from self._out.add(made)
            error = incoming.end
        except Exception as found:  # noqa: BLE001 (raised again unless it is the source's)
            assert self._task is not None
            error = error_of(self._task, found)
        if error is not None:
            self._step = None
            yield from self._out.end(error)


class _Outcome:
    """The result of one task on its way to the driver.

    Args:
        sent: number and task, pickled.
    """

    def __init__(self, sent: bytes) -> None:
        self._number, _ = cloudpickle.loads(sent)
        self._result: bytes | None = None

    def add(self, result: Any) -> Iterator[pa.Table]:
        """Hold the result."""
        self._result = cloudpickle.dumps(result)
        yield from ()

    def end(self, error: str = "") -> Iterator[pa.Table]:
        """Yield the task's only row."""
        columns = [
            pa.array([self._number], pa.int32()),
            pa.array([error or None], pa.string()),
            pa.array([self._result], pa.binary()),
        ]
        yield pa.table(columns, names=[_TASK, _ERROR, _RESULT])


def _transforming(step: Callable[..., Iterator[pa.Table]]) -> Callable[[pa.Table], Iterator[pa.Table]]:
    operator = _Operator(lambda tables, task: step(tables, *task.arguments(), **task.kwargs), _Outgoing)

    def transform(block: pa.Table) -> Iterator[pa.Table]:
        return operator(block)

    transform.__name__ = step.__name__
    return transform


def _writing(step: Callable[..., Any]) -> Callable[[pa.Table], Iterator[pa.Table]]:
    operator = _Operator(lambda tables, task: [step(tables, *task.arguments(), **task.kwargs)], _Outcome)

    def write(block: pa.Table) -> Iterator[pa.Table]:
        return operator(block)

    write.__name__ = step.__name__
    return write
