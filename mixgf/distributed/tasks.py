"""Work units over Ray tasks, or in a plain loop: what `prepare` and `import` are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixgf.config.run import Config
from mixgf.console import Progress, warn
from mixgf.corpus import shards
from mixgf.distributed.metrics import Meter
from mixgf.errors import UserError
from mixgf.storage import files


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


@dataclass(kw_only=True)
class Passes:
    """The passes of one stage over its sources: jobs whose part is there are not done again, unusable sources are refused."""

    stage: str
    work: str
    """URI of the folder of parts (`units.part`)."""
    num_sources: int
    strict: bool
    """`prepare.strict`: the first unusable source stops the run."""
    spread: Spread
    meter: Meter
    refused: dict[int, str] = field(default_factory=dict)
    """Why, by source: the least of its reasons, so that records do not depend on what was read first."""
    settled: bool = False
    """Whether it is decided which sources are refused: one that cannot be read after that has changed, and stops the run."""

    def run(self, what: str, kind: str, jobs: Mapping[Any, Job], unit: str = "cells", counter: str = "") -> None:
        """Do the jobs (by name of their part) whose part is not there; `counter` is the metric that counts their weight."""
        have = set(files.list_dir(files.join(self.work, kind)))
        todo = [j for name, j in jobs.items() if shards.part_uri("", kind, name).rsplit("/", 1)[-1] not in have]
        total = sum(j.weight for j in jobs.values())
        done = total - sum(j.weight for j in todo)
        with Progress(f"{self.stage}: {what}", total, unit, done=done) as progress:
            for finished, (i, why) in enumerate(self.spread(todo), 1):
                if why and (todo[i].source < 0 or self.settled):
                    raise UserError(why)
                if why:
                    self.refuse(todo[i].source, why)
                if counter:
                    self.meter.add(counter, todo[i].weight)
                self.meter.units(waiting=len(todo) - finished, done=finished, failed=len(self.refused))
                done += todo[i].weight
                progress.update(done)

    def refuse(self, index: int, why: str) -> None:
        """Leave a source out; a `UserError` if none is left, or if `strict`."""
        if self.strict:
            raise UserError(why)
        if index not in self.refused:
            warn(f"refused: {why}")
        self.refused[index] = min(self.refused.get(index, why), why)
        if len(self.refused) == self.num_sources:
            first = self.refused[min(self.refused)]
            msg = (
                first if len(self.refused) == 1 else f"all {len(self.refused)} sources are refused; the first: {first}"
            )
            raise UserError(msg)
