"""Pieces of work that write one part file each, spread over Ray tasks.

A piece whose file is there is not made again, so a run killed at any moment continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixgf.classification.splits import Split
from mixgf.classification.workspace import Workspace
from mixgf.config.run import Config
from mixgf.console import Progress
from mixgf.distributed.metrics import Meter
from mixgf.storage import files


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """One part to be made, if its file is not there."""

    uri: str
    call: Callable[..., None]
    args: tuple[Any, ...]
    cost: float
    """In seconds of one core, roughly; for the order and the time left."""
    threads: int = 1
    gpu: bool = False


Spread = Callable[[Sequence[Piece]], Iterator[int]]
"""Makes pieces in any order; yields the number of each finished piece."""


def loop(pieces: Sequence[Piece]) -> Iterator[int]:
    """The plain loop: what Ray must equal."""
    for i, piece in enumerate(pieces):
        piece.call(*piece.args)
        yield i


def ray_tasks(config: Config) -> Spread:
    """Spread pieces over Ray tasks; lost workers and network errors are tried again."""
    import ray
    import torch

    from mixgf.distributed.session import require_gpus

    def make(call: Callable[..., None], threads: int, *args: Any) -> None:
        torch.set_num_threads(threads)
        call(*args)

    task = ray.remote(make)
    cpus, gpus = config.compute.cpus_per_worker, config.compute.gpus_per_worker

    def spread(pieces: Sequence[Piece]) -> Iterator[int]:
        require_gpus(gpus if any(piece.gpu for piece in pieces) else 0)
        shared: dict[int, Any] = {}  # what many pieces carry is put into the object store once

        def reference(value: Any) -> Any:
            if not isinstance(value, (Workspace, Split)):
                return value
            if id(value) not in shared:
                shared[id(value)] = ray.put(value)
            return shared[id(value)]

        running: dict[Any, int] = {}
        for i, piece in enumerate(pieces):
            options = {
                "num_cpus": max(cpus, float(piece.threads)), "num_gpus": gpus if piece.gpu else 0, "max_retries": 3,
                "retry_exceptions": [OSError],
            }  # fmt: skip
            args = [reference(a) for a in piece.args]
            running[task.options(**options).remote(piece.call, piece.threads, *args)] = i
        while running:
            for ref in ray.wait(list(running), num_returns=1)[0]:
                number = running.pop(ref)
                try:
                    ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    for other in running:
                        ray.cancel(other, force=True)
                    raise (error.cause or error) from None
                yield number

    return spread


def missing(pieces: Sequence[Piece]) -> list[Piece]:
    """Those whose file is not there, by one look into each folder."""
    folders = {folder: set(files.list_dir(folder)) for folder in {p.uri.rpartition("/")[0] for p in pieces}}
    return [p for p in pieces if p.uri.rpartition("/")[2] not in folders[p.uri.rpartition("/")[0]]]


def make(
    what: str, pieces: Sequence[Piece], spread: Spread, meter: Meter, done: Callable[[Piece], None] = lambda _: None
) -> None:
    """Make the pieces that are not there, the longest first; `done` is called in this process with each of them."""
    todo = sorted(missing(pieces), key=lambda p: (-p.cost, p.uri))
    total = sum(p.cost for p in pieces)
    spent = total - sum(p.cost for p in todo)
    finished = 0
    with Progress(what, total, "core-s", done=spent) as progress:
        try:
            for i in spread(todo):
                spent, finished = spent + todo[i].cost, finished + 1
                progress.update(spent)
                meter.units(waiting=len(todo) - finished, done=finished)
                done(todo[i])
        except Exception:
            meter.units(waiting=len(todo) - finished - 1, done=finished, failed=1)
            raise
