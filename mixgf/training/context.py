"""Moved here from mixgf/objectives.py, mixgf/train.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """What an objective needs to know of the other workers."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def all_reduce(self, x: Tensor) -> None:
        """Sum a tensor over all workers, in place."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in `train.precision`; weights stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


Row = tuple[int, int, str, float]
"""A figure: steps done, epoch, name, value."""


class Context(Group, Protocol):
    """Where the loop runs: one worker of a group, and somebody who listens."""

    def barrier(self) -> None:
        """Wait for all workers."""

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Figures of one step, on rank 0, now and then; after a restart steps may come again."""

    def commit(self, rows: list[Row]) -> None:
        """Figures since the last checkpoint, on rank 0, in a background thread; no step comes twice."""

    def recover(self, rows: list[Row]) -> None:
        """Figures up to the checkpoint that training goes on from, on rank 0, before it does.

        A worker that died between that checkpoint and the end of `commit` has left some of them uncommitted.
        """


@dataclass
class LocalContext:
    """The loop alone in this process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1

    def all_reduce(self, x: Tensor) -> None:
        """Nothing to add."""

    def barrier(self) -> None:
        """Nobody to wait for."""

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Nobody listens."""

    def commit(self, rows: list[Row]) -> None:
        """Nobody listens."""

    def recover(self, rows: list[Row]) -> None:
        """Nobody listens."""


class GroupContext(LocalContext):
    """One worker of the default process group of torch.distributed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, dist.get_rank(), dist.get_world_size())

    def all_reduce(self, x: Tensor) -> None:
        """Sum over all workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()
