"""An elastic pool of Ray actors that run tasks: the `WorkerPool` of `RayExecutor`.

Ray's own pools lose a run with one dead actor (`ActorPool`) or ramp up actor by actor and never reach zero (Ray Data). This
one is a loop over `ray.wait`:

- it asks at once for as many actors as there is work, up to a maximum: those the cluster has no room for stay pending, and
  pending actors are what the cluster's autoscaler sees as demand. Work goes only to actors that are up;
- each actor builds its worker (loads the model) once and keeps it; a second task waits in its queue, so that it never idles;
- a task that fails, or whose actor dies with it, is tried again elsewhere, a few times; then its receipt has the error, and
  the rest goes on. An actor that dies with two tasks in hand does not say which of them killed it (the answer to the first
  may have died with it): neither failure counts, and each of the two then runs alone on an actor, which shows the cause;
- actors beyond the minimum that have nothing to do, or are not up yet, are given back after a while, and all at the end. One
  that still loads when a list of tasks is done is there for the next.

Receipts come one by one, in the order in which tasks end; their numbers say which is which.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from mixgf.distributed.session import require_gpus
from mixgf.errors import UserError
from mixgf.execution import Receipt, Receipts, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Actors of a pool, and what each of them needs."""

    min_actors: int = 1
    """Kept while the pool is open, even without work."""
    max_actors: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources per actor."""


@dataclass(slots=True)
class _Actor:
    handle: Any
    up: bool = False
    queue: deque[int] = field(default_factory=deque)
    """Numbers of the tasks given to it, oldest (the one it works on) first."""
    idle_since: float = 0.0


class _Run:
    """What is left of one call of `ActorPool.run`."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.waiting = deque(range(len(tasks)))
        """Numbers of tasks, the next one first."""
        self.flying: dict[Any, tuple[_Actor, int]] = {}
        """Tasks given to an actor, by the reference of their answer."""
        self.alone: set[int] = set()
        """Tasks that were in hand when an actor died with two: no other task shares an actor with one of them."""
        self._failures: dict[int, int] = {}

    def goes_on(self, stop: Callable[[int], bool] | None) -> bool:
        """Whether anything is left to do; after a stop, no more than what is in hand."""
        if self.waiting and stop is not None and stop(len(self.flying)):
            self.waiting.clear()
        return bool(self.waiting or self.flying)

    def failed(self, number: int, reason: str, retries: int) -> list[Receipt]:
        """Count a failure: the task waits again, or its last receipt is returned."""
        self._failures[number] = self._failures.get(number, 0) + 1
        if self._failures[number] > retries:
            return [Receipt(number, error=reason)]
        self.waiting.append(number)
        return []


class _Host:
    """Holds one worker in its own process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.worker = make()

    def run(self, task: Task) -> Any:
        return task.call(self.worker)


_RemoteHost: Any = ray.remote(max_restarts=0, max_task_retries=0)(_Host)


class ActorPool:
    """Open with `with ActorPool(make, size) as pool`, then `pool.run(tasks)` any number of times.

    Args:
        make: builds a worker; called once in every actor. It and the tasks must be serialisable.
        size: bounds and needs.
        retries: times that a failed task is tried again.
        idle_seconds: how long an actor beyond the minimum may be without work, or on its way without being needed.
        max_failed_starts: actors that may die before they are up, in a row, until the pool raises `UserError`.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        size: Size,
        *,
        retries: int = 2,
        idle_seconds: float = 10.0,
        max_failed_starts: int = 5,
    ) -> None:
        self.size, self.retries, self.idle_seconds = size, retries, idle_seconds
        self.max_failed_starts = max_failed_starts
        self.most_actors = 0
        """Most actors that were up at a time."""
        self.num_deaths = 0
        """Actors lost with their work, or before they were up."""
        require_gpus(size.gpus)
        self._make = ray.put(make)
        self._actors: list[_Actor] = []
        self._starting: dict[Any, _Actor] = {}
        self._failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()
        self._starting.clear()

    @property
    def num_actors(self) -> int:
        """Actors that are up or asked for."""
        return len(self._actors)

    @property
    def num_up(self) -> int:
        """Actors that are up."""
        return sum(actor.up for actor in self._actors)

    def run(self, tasks: Sequence[Task], *, stop: Callable[[int], bool] | None = None) -> Receipts:
        """Run all tasks, first to last as far as possible.

        Args:
            tasks: what to run; functions receive the worker as first argument.
            stop: called with the number of tasks in hand before more are given out; true = no more are given out.

        Yields:
            A receipt of each task; one that failed every time has the reason as its error.
        """
        state = _Run(tasks)
        for actor in self._actors:
            actor.idle_since = time.monotonic()
        try:
            while state.goes_on(stop):
                self._scale(len(state.waiting) + len(state.flying))
                self._feed(state)
                for ref in _ready([*state.flying, *self._starting]):
                    if ref in self._starting:
                        self._started(ref, self._starting.pop(ref))
                    elif ref in state.flying:  # else of an actor that died a moment ago
                        yield from self._ended(ref, state)
        finally:
            for actor in self._actors:
                actor.queue.clear()

    def _ended(self, ref: Any, state: _Run) -> list[Receipt]:
        """Take the answer to one task: its receipt, or none where it is tried again."""
        actor, number = state.flying[ref]
        try:
            result = ray.get(ref)
        except RayActorError as error:
            return self._lost(actor, state, f"its actor died: {_first_line(error)}")
        except RayError as error:
            found = state.failed(number, _reason(error), self.retries)
        else:
            found = [Receipt(number, result=result)]
        del state.flying[ref]
        actor.queue.remove(number)
        actor.idle_since = time.monotonic()
        return found

    def _lost(self, actor: _Actor, state: _Run, reason: str) -> list[Receipt]:
        """An actor died: its only task failed; of two, each waits again and then runs alone."""
        self._give_back([actor])  # it may only be out of reach: it must not keep its place
        self.num_deaths += 1
        for ref in [ref for ref, (owner, _) in state.flying.items() if owner is actor]:
            del state.flying[ref]
        if len(actor.queue) == 1:
            return state.failed(actor.queue[0], reason, self.retries)
        state.alone.update(actor.queue)
        state.waiting.extendleft(reversed(actor.queue))
        return []

    def _give_back(self, actors: Iterable[_Actor]) -> None:
        for actor in list(actors):
            ray.kill(actor.handle)
            self._actors.remove(actor)
            self._starting = {ref: one for ref, one in self._starting.items() if one is not actor}

    def _scale(self, num_tasks: int) -> None:
        """Ask for actors up to the work there is; give back those beyond it that have none, first those that are not up."""
        wanted = max(self.size.min_actors, min(self.size.max_actors, num_tasks))
        while len(self._actors) < wanted:
            options = {"num_cpus": self.size.cpus, "num_gpus": self.size.gpus, "resources": self.size.resources}
            handle = _RemoteHost.options(**options).remote(self._make)
            actor = _Actor(handle, idle_since=time.monotonic())
            self._actors.append(actor)
            self._starting[handle.__ray_ready__.remote()] = actor
        now = time.monotonic()
        idle = [actor for actor in self._actors if not actor.queue and now - actor.idle_since >= self.idle_seconds]
        self._give_back(sorted(idle, key=lambda actor: actor.up)[: max(0, len(self._actors) - wanted)])

    def _feed(self, state: _Run) -> None:
        """Give each actor a task, and one to have ready unless others would go without or one of the two must run alone."""
        waiting, ups = state.waiting, [actor for actor in self._actors if actor.up]
        for depth in (1, 2):
            for actor in ups:
                if depth == 2 and len(waiting) <= len(self._actors):
                    return  # towards the end one task in hand is enough
                apart = waiting and actor.queue and not state.alone.isdisjoint((waiting[0], actor.queue[0]))
                if waiting and len(actor.queue) < depth and not apart:
                    number = waiting.popleft()
                    actor.queue.append(number)
                    state.flying[actor.handle.run.remote(state.tasks[number])] = (actor, number)

    def _started(self, ref: Any, actor: _Actor) -> None:
        try:
            ray.get(ref)
        except RayActorError as error:
            self._actors.remove(actor)
            self.num_deaths += 1
            self._failed_starts += 1
            if self._failed_starts >= self.max_failed_starts:
                msg = f"{self._failed_starts} workers in a row failed to start: {_cause(error)}"
                raise UserError(msg) from error
            time.sleep(min(5.0, 0.1 * math.pow(2, self._failed_starts)))
        else:
            actor.up, actor.idle_since = True, time.monotonic()
            self._failed_starts = 0
            self.most_actors = max(self.most_actors, self.num_up)


def _ready(refs: list[Any]) -> list[Any]:
    """All that is ready, as soon as anything is, or after a second.

    Of one at a time Ray picks any, in an order of its own: quick items could keep a new actor waiting until all are done.
    """
    ray.wait(refs, num_returns=1, timeout=1.0)
    return list(ray.wait(refs, num_returns=len(refs), timeout=0)[0])


def _reason(error: RayError) -> str:
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    return f"{type(cause).__name__}: {cause}" if cause is not None else _first_line(error)


def _cause(error: BaseException) -> str:
    """The last line of a remote traceback says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
