"""The group of workers that train one model: sums over workers, gradients of all of them, and where metrics go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixgf import termination
from mixgf.training.gradient_sums import ARGUMENTS, HOOKS


class Group(Protocol):
    """A worker's place in its group, and the sum over the group."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def all_reduce(self, x: Tensor) -> None:
        """Sum a tensor over all workers, in place."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context for `train.precision` (`fp32` or `bf16`); weights stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


MetricRow = tuple[int, int, str, float]
"""A metric: steps done, epoch, name, value."""
Seen = Callable[[int, dict[str, float]], None]
"""Called in the driver with the figures of some logged steps."""


def ignore(step: int, figures: dict[str, float]) -> None:
    """Do nothing with the figures of a step."""


class Asked(NamedTuple):
    """What a worker is asked to do after its step."""

    save: bool = False
    """Write a checkpoint and go on: the worker's node is about to be taken away."""
    stop: bool = False
    """Write a checkpoint and end."""
    look: bool = False
    """Find out by `Context.agree`, with all other workers."""


class Context(Group, Protocol):
    """A worker of a group, with a place to report metrics to."""

    def asked(self) -> Asked:
        """What this worker was asked to do since the last step; the whole group does what any of its workers is asked."""

    def agree(self, asked: Asked) -> Asked:
        """What the group does, of what any of its workers was asked; called by all workers in the same step."""

    def parallel(self, module: nn.Module, reduce: str) -> nn.Module:
        """The module such that its backward pass sums gradients over all workers; in a group of one, the module itself.

        `reduce` is `train.reduce`.
        """

    def barrier(self) -> None:
        """Wait for all workers."""

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Report the metrics of a logged step, on rank 0; after a restart a step may be reported again."""

    def commit(self, rows: list[MetricRow]) -> None:
        """Record the metrics since the last checkpoint, on rank 0, in a background thread; each step is recorded once."""

    def recover(self, rows: list[MetricRow]) -> None:
        """Receive the metrics up to the checkpoint that training resumes from, on rank 0, before it resumes.

        If the worker died before the end of `commit`, some of them were not recorded.
        """


@dataclass
class LocalContext:
    """A group of one worker, in this process; metrics are not reported."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1

    def parallel(self, module: nn.Module, reduce: str) -> nn.Module:
        """The module itself."""
        return module

    def asked(self) -> Asked:
        """To stop, once the process got SIGTERM."""
        return Asked(stop=termination.requested())

    def agree(self, asked: Asked) -> Asked:
        """The same."""
        return asked

    def all_reduce(self, x: Tensor) -> None:
        """Nothing to sum."""

    def barrier(self) -> None:
        """No other workers."""

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Do nothing."""

    def commit(self, rows: list[MetricRow]) -> None:
        """Do nothing."""

    def recover(self, rows: list[MetricRow]) -> None:
        """Do nothing."""


class GroupContext(LocalContext):
    """One worker of the default process group of torch.distributed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, dist.get_rank(), dist.get_world_size())

    def parallel(self, module: nn.Module, reduce: str) -> nn.Module:
        """The module in DistributedDataParallel, with gradients that add up (`training.gradient_sums`)."""
        if self.world_size == 1:
            return module
        wrapped = self.wrap(module)
        wrapped.register_comm_hook(None, HOOKS[reduce])
        return wrapped

    def wrap(self, module: nn.Module) -> DistributedDataParallel:
        """The module in DistributedDataParallel."""
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, **ARGUMENTS)

    def all_reduce(self, x: Tensor) -> None:
        """Sum over all workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()
