"""Work as tasks, and the executors that run them.

A stage lists its tasks; each writes one part file. An executor runs tasks in any order and gives back a receipt for each.
A task whose work is rows of cells has a `Pipeline` for its function: read, transform, write.
Results do not depend on the executor, because a part depends on its task alone. `LocalExecutor` is the reference;
`mixgf.distributed.executor.RayExecutor` spreads the same tasks over a Ray cluster.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mixgf.errors import DamagedError, UserError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, eq=False, slots=True)
class Shared:
    """An argument that many tasks carry: an executor sends it to the workers once. Functions receive its value."""

    value: Any


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Task:
    """One call that writes one part file. It must be serialisable, and give the same file each time it runs."""

    part: str
    """URI of the file that it writes; a stage does not run a task whose file is there."""
    also: tuple[str, ...] = ()
    """URIs of further files that it writes before its part."""
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    """Positional arguments; `Shared` ones are sent once."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    """Amount of work, in the unit of its stage: cells, bytes, tokens or core-seconds."""
    threads: int = 0
    """Threads of torch; 0 = the function does not use torch."""
    gpu: bool = False
    """Whether it uses `compute.gpus_per_worker`."""
    source: int = -1
    """Number of the source that the stage leaves out if the task has an error; -1 = of no source, and the stage stops."""

    def arguments(self) -> list[Any]:
        """Positional arguments, with the values of the `Shared` ones."""
        return [a.value if isinstance(a, Shared) else a for a in self.args]

    def call(self, *first: Any) -> Any:
        """Call the function, with `first` before its own arguments; returns its result."""
        return self.function(*first, *self.arguments(), **self.kwargs)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """A function of a task in steps over tables of rows. A call runs them with one table in memory at a time.

    `RayExecutor` runs them as operators of Ray Data. All steps get the task's arguments. The part file must not depend on
    how rows are cut into tables. Every step but the last yields at least one row.
    """

    name: str
    """Of the whole, for messages."""
    source: str
    """What is read, for the name of Ray Data's operator: `ReadSOURCE`."""
    read: Callable[..., Iterator[pa.Table]]
    """Called with the task's arguments."""
    steps: tuple[Callable[..., Iterator[pa.Table]], ...] = ()
    """Each is called with the tables of the step before it and the task's arguments."""
    write: Callable[..., Any]
    """Called with the tables of the last step and the task's arguments; writes the part. Its result is the task's."""
    release: Callable[[], None] | None = None
    """Called before each task in a process that Ray keeps for many: frees what tasks of other functions left there."""

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run all steps in this process; returns the result of `write`."""
        tables = self.read(*args, **kwargs)
        for step in self.steps:
            tables = step(tables, *args, **kwargs)
        return self.write(tables, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The end of one task."""

    number: int
    """Place of the task in the sequence given to `run`."""
    error: str = ""
    """Why it wrote no part, as `error_of` says it; empty = it did."""
    result: Any = None
    """What the function returned; small and plain."""
    lost: bool = False
    """Whether it ended its worker each time it ran: too little memory, for example, or a library that crashes."""


Receipts = Generator[Receipt, None, None]
"""Receipts as tasks end, in any order. Closing the generator cancels the tasks that still run."""


class WorkerPool(Protocol):
    """Workers that keep state between tasks, for example a loaded model. Functions receive the worker as first argument."""

    @property
    def num_actors(self) -> int:
        """Workers that are up or asked for."""

    @property
    def num_up(self) -> int:
        """Workers that are up."""

    def run(self, tasks: Sequence[Task], *, stop: Callable[[int], bool] | None = None) -> Receipts:
        """Run tasks, the first ones first as far as possible.

        Args:
            tasks: what to run.
            stop: called with the number of tasks in hand before more are given out; true = no more are given out.
        """


class Executor(Protocol):
    """Runs the tasks of a stage."""

    @property
    def local(self) -> bool:
        """Whether all work is done in this process. A training then needs no worker group."""

    def session(self) -> AbstractContextManager[None]:
        """What must be open while tasks run. Sessions may be nested; the outermost one counts."""

    def run(self, tasks: Sequence[Task]) -> Receipts:
        """Run tasks. What the source of a task makes it raise becomes the receipt's error (`error_of`); other errors end the run."""

    def pool(self, worker: Callable[[], Any], *, most: int = 0) -> AbstractContextManager[WorkerPool]:
        """Open a pool of workers.

        Args:
            worker: builds one worker; serialisable.
            most: largest number of workers; 0 = `compute.num_workers`.
        """


def attempt(number: int, task: Task) -> Receipt:
    """Run one task; what its source makes it raise becomes the receipt's error, so that one bad source does not lose a run."""
    try:
        return Receipt(number, result=task.call())
    except Exception as error:  # noqa: BLE001 (raised again unless it is the source's)
        return Receipt(number, error=error_of(task, error))


def error_of(task: Task, error: Exception) -> str:
    """What a task's receipt says of an error: one line, and after it the traceback of an error that is no `UserError`.

    Raises:
        Exception: the error itself, where it ends the run: a damaged file of mixgf's own, for which no source is refused; an
            error of a task of no source that is no `UserError`; or a failure of storage, which is tried again.
    """
    if isinstance(error, DamagedError) and task.source >= 0:
        raise error
    if isinstance(error, UserError):
        return str(error)
    if task.source < 0 or isinstance(error, OSError):
        raise error
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"cannot be used ({type(error).__name__}: {first[:300]}); --debug shows where\n{''.join(traceback.format_exception(error))}"


class LocalExecutor:
    """Runs tasks one after the other in this process: the reference that every other executor must equal."""

    local = True

    def session(self) -> AbstractContextManager[None]:
        """Nothing to open."""
        return nullcontext()

    def run(self, tasks: Sequence[Task]) -> Receipts:
        """Run tasks in order."""
        for number, task in enumerate(tasks):
            yield attempt(number, task)

    def pool(self, worker: Callable[[], Any], *, most: int = 0) -> AbstractContextManager[LocalPool]:
        """One worker in this process, whatever `most` says."""
        return nullcontext(LocalPool(worker))


class LocalPool:
    """One worker in this process, built with the first task. Every error is raised."""

    num_actors = num_up = 1

    def __init__(self, worker: Callable[[], Any]) -> None:
        self._make, self._worker = worker, None

    def run(self, tasks: Sequence[Task], *, stop: Callable[[int], bool] | None = None) -> Receipts:
        """Run tasks in order."""
        for number, task in enumerate(tasks):
            if stop is not None and stop(0):
                return
            if self._worker is None:
                self._worker = self._make()
            yield Receipt(number, result=task.call(self._worker))
