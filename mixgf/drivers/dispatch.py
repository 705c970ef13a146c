"""Work units over Ray tasks, or in a plain loop: what `prepare` and `import` are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixgf.config import Config, UserError


@dataclass(frozen=True, slots=True)
class Job:
    """One call of a unit function; `weight` is its share of the pass, in cells or files."""

    source: int
    """Number of the source that is refused if the call raises `UserError`; -1: of none, and the run stops."""
    weight: int
    function: Callable[..., None]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Spread = Callable[[Sequence[Job]], Iterator[tuple[int, str]]]
"""Runs jobs in any order; yields (number of the job, "" or why it was refused)."""


def job(source: int, weight: int, function: Callable[..., None], *args: Any, **kwargs: Any) -> Job:
    """A job, written like the call that it makes."""
    return Job(source, weight, function, args, kwargs)


def attempt(what: Job) -> str:
    """Make one call; a `UserError` becomes its text, so that one bad source does not lose the run."""
    try:
        what.function(*what.args, **what.kwargs)
    except UserError as error:
        return str(error)
    return ""


def loop(jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
    """The plain loop: what Ray must equal."""
    for i, one in enumerate(jobs):
        yield i, attempt(one)


def ray_tasks(config: Config) -> Spread:
    """Spread jobs over Ray tasks, `compute.num_workers` at a time; lost workers and network errors are tried again."""
    import ray

    options = {"num_cpus": config.compute.cpus_per_worker, "max_retries": 3, "retry_exceptions": [OSError]}
    task = ray.remote(attempt).options(**options)

    def spread(jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        running: dict[Any, int] = {}
        todo = iter(enumerate(jobs))
        while True:
            while len(running) < config.compute.num_workers and (following := next(todo, None)) is not None:
                running[task.remote(following[1])] = following[0]
            if not running:
                return
            for ref in ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(ref), ray.get(ref)

    return spread
