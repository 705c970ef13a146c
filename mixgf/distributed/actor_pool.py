"""An elastic pool of Ray actors over a list of work items.

Ray's own pools lose a run with one dead actor (`ActorPool`) or ramp up actor by actor and never reach zero (Ray Data). This
one is a loop over `ray.wait`:

- it asks at once for as many actors as there is work, up to a maximum: those the cluster has no room for stay pending, and
  pending actors are what the cluster's autoscaler sees as demand. Work goes only to actors that are up;
- each actor builds its worker (loads the model) once and keeps it; a second item waits in its queue, so that it never idles;
- an item that fails, or whose actor dies with it, is tried again elsewhere, a few times; then it goes to the dead letter,
  and the rest goes on. An actor that dies with two items in hand does not say which of them killed it (the answer to the
  first may have died with it): neither is blamed, and each is then worked on alone, where guilt is plain;
- actors beyond the minimum that have nothing to do, or are not up yet, are given back after a while, and all at the end. One
  that still loads when a list is done is there for the next.

Results are handed to the caller one by one, in the order in which they come; keys say which is which.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from mixgf.distributed.session import require_gpus
from mixgf.errors import UserError


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
    queue: deque[Any] = field(default_factory=deque)
    """Item keys given to it, oldest (the one it works on) first."""
    idle_since: float = 0.0


class _Host:
    """Holds one worker in its own process."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self.work = make()

    def run(self, item: Any) -> Any:
        return self.work(item)


_RemoteHost: Any = ray.remote(max_restarts=0, max_task_retries=0)(_Host)


class Pool:
    """Open with `with Pool(make, size) as pool`, then `pool.run(items, done)` any number of times.

    Args:
        make: builds a worker, a function of one item; called once in every actor. It and the items must be serialisable.
        size: bounds and needs.
        retries: times that a failed item is tried again.
        idle_seconds: how long an actor beyond the minimum may be without work, or on its way without being needed.
        max_failed_starts: actors that may die before they are up, in a row, until the pool gives up.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Any], Any]],
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

    def run(
        self,
        items: Mapping[str, Any],
        done: Callable[[str, Any], None],
        stop: Callable[[int], bool] = lambda _: False,
    ) -> dict[str, str]:
        """Work through all items, first to last as far as possible.

        Args:
            items: key to item.
            done: called in this process with every key and result.
            stop: asked, with the number of items in hand, before more are given out: true = those are the last.

        Returns:
            The dead letter: key to reason of the items that failed every time.
        """
        waiting = deque(items)
        alone: set[str] = set()
        failures: dict[str, int] = {}
        dead: dict[str, str] = {}
        flying: dict[Any, tuple[_Actor, str]] = {}
        self._all_busy()

        def lost(actor: _Actor, reason: str) -> None:
            """An actor died: blame its item, or put back two suspects, each to be worked on alone."""
            self._give_back([actor])  # it may only be out of reach: it must not keep its place
            self.num_deaths += 1
            for ref in [ref for ref, (owner, _) in flying.items() if owner is actor]:
                del flying[ref]
            if len(actor.queue) == 1:
                failed(actor.queue[0], reason)
            else:
                alone.update(actor.queue)
                waiting.extendleft(reversed(actor.queue))

        def failed(key: str, reason: str) -> None:
            failures[key] = failures.get(key, 0) + 1
            if failures[key] > self.retries:
                dead[key] = reason
            else:
                waiting.append(key)

        while _go_on(waiting, len(flying), stop):
            self._scale(len(waiting) + len(flying))
            self._feed(waiting, items, flying, alone)
            for ref in _ready([*flying, *self._starting]):
                if ref in self._starting:
                    self._started(ref, self._starting.pop(ref))
                    continue
                if ref not in flying:
                    continue  # of an actor that died a moment ago
                actor, key = flying[ref]
                try:
                    result = ray.get(ref)
                except RayTaskError as error:
                    failed(key, _reason(error))
                except RayActorError as error:
                    lost(actor, f"its actor died: {_first_line(error)}")
                    continue
                except RayError as error:
                    failed(key, _first_line(error))
                else:
                    done(key, result)
                del flying[ref]
                actor.queue.remove(key)
                actor.idle_since = time.monotonic()
        return dead

    def _all_busy(self) -> None:
        for actor in self._actors:
            actor.idle_since = time.monotonic()

    def _give_back(self, actors: Iterable[_Actor]) -> None:
        for actor in list(actors):
            ray.kill(actor.handle)
            self._actors.remove(actor)
            self._starting = {ref: one for ref, one in self._starting.items() if one is not actor}

    def _scale(self, num_items: int) -> None:
        """Ask for actors up to the work there is; give back those beyond it that have none, first those that are not up."""
        wanted = max(self.size.min_actors, min(self.size.max_actors, num_items))
        while len(self._actors) < wanted:
            options = {"num_cpus": self.size.cpus, "num_gpus": self.size.gpus, "resources": self.size.resources}
            handle = _RemoteHost.options(**options).remote(self._make)
            actor = _Actor(handle, idle_since=time.monotonic())
            self._actors.append(actor)
            self._starting[handle.__ray_ready__.remote()] = actor
        now = time.monotonic()
        idle = [actor for actor in self._actors if not actor.queue and now - actor.idle_since >= self.idle_seconds]
        self._give_back(sorted(idle, key=lambda actor: actor.up)[: max(0, len(self._actors) - wanted)])

    def _feed(
        self, waiting: deque[str], items: Mapping[str, Any], flying: dict[Any, tuple[_Actor, str]], alone: set[str]
    ) -> None:
        """Give each actor an item to work on, and one to have ready unless others would go without or one is suspected."""
        ups = [actor for actor in self._actors if actor.up]
        for depth in (1, 2):
            for actor in ups:
                if depth == 2 and len(waiting) <= len(self._actors):
                    return  # towards the end one item in hand is enough
                suspected = waiting and actor.queue and not alone.isdisjoint((waiting[0], actor.queue[0]))
                if waiting and len(actor.queue) < depth and not suspected:
                    key = waiting.popleft()
                    actor.queue.append(key)
                    flying[actor.handle.run.remote(items[key])] = (actor, key)

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


def _go_on(waiting: deque[str], in_hand: int, stop: Callable[[int], bool]) -> bool:
    """Whether anything is left to do; on a stop, no more than what is in hand."""
    if waiting and stop(in_hand):
        waiting.clear()
    return bool(waiting or in_hand)


def _reason(error: RayTaskError) -> str:
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {cause}" if cause is not None else _first_line(error)


def _cause(error: BaseException) -> str:
    """The last line of a remote traceback says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
