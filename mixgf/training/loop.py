"""One training loop in plain PyTorch, for pretraining and fine-tuning, against a small `Context`.

A `Task` says which work a step is and adds its gradients; the loop owns order, schedule, optimizer, reduction over the
workers, figures and checkpoints. All gradients live in one flat buffer with the step's figures at its end: one reduction
per step, one wait for the device per step. Losses are sums divided by counts over all workers, so they do not depend on
how a batch is split.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import torch
from torch import Tensor, nn

from mixgf.config import training
from mixgf.console import warn
from mixgf.encoder.batch import Batch
from mixgf.errors import UserError
from mixgf.storage import files, tables
from mixgf.training import checkpoints
from mixgf.training.context import Context, Group, Row, autocast
from mixgf.training.prefetch import Prefetch

W = TypeVar("W", bound="Workload")
M_contra = TypeVar("M_contra", bound=nn.Module, contravariant=True)


class Workload(Protocol):
    """A worker's share of one step."""

    @property
    def epoch(self) -> int: ...
    @property
    def num_cells(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def flops(self) -> float: ...


class Task(Protocol[M_contra, W]):
    """What is trained on."""

    @property
    def num_steps(self) -> int: ...

    def work(self, step: int, rank: int, world_size: int) -> W:
        """A worker's share of a step: a pure function, called in a background thread."""

    def backward(self, model: M_contra, work: W, group: Group) -> dict[str, Tensor]:
        """Add gradients; returns scalars, `loss` among them, whose sums over the workers are the global figures."""


@dataclass(frozen=True, slots=True)
class BatchWork:
    """The work of a `LossTask`: micro batches, and the number that the sums of all workers are divided by."""

    batches: list[Batch]
    count: float
    epoch: int = 0
    flops: float = 0.0

    @property
    def num_cells(self) -> int:
        """Cells of this worker."""
        return sum(batch.num_cells for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Tokens of this worker."""
        return sum(batch.num_tokens for batch in self.batches)


@dataclass(frozen=True)
class LossTask(Generic[M_contra]):
    """A task from two functions, for fine-tuning.

    Args:
        num_steps: optimizer steps in all.
        batches: (step, rank, world_size) to the worker's micro batches and the global count; pure.
        loss: (model, batch) to sums over the batch's cells, `loss` among them; each is divided by the count.
        precision: `fp32` or `bf16`.
    """

    num_steps: int
    batches: Callable[[int, int, int], BatchWork]
    loss: Callable[[Any, Batch], dict[str, Tensor]]
    precision: str = "fp32"

    def work(self, step: int, rank: int, world_size: int) -> BatchWork:
        """The worker's micro batches."""
        return self.batches(step, rank, world_size)

    def backward(self, model: M_contra, work: BatchWork, group: Group) -> dict[str, Tensor]:
        """Gradients of the mean loss, summed over micro batches."""
        figures: dict[str, Tensor] = {"loss": torch.zeros((), device=group.device)}
        for batch in work.batches:
            with autocast(group.device, self.precision):
                sums = self.loss(model, batch.to(group.device))
            (sums["loss"] / work.count).backward()  # type: ignore[no-untyped-call]
            for name, value in sums.items():
                figures[name] = figures.get(name, torch.zeros((), device=group.device)) + value.detach() / work.count
        return figures


def learning_rate(settings: training.Train, step: int, num_steps: int) -> float:
    """Learning rate of a step counted from 0: linear warm-up, then `train.schedule` down to zero at the end."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    scale = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.lr * scale[settings.schedule]


def make_optimizer(model: nn.Module, settings: training.Train) -> torch.optim.AdamW:
    """AdamW; biases and layer norms do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, fused=True)


def measure_peak(device: torch.device, precision: str, *, seconds: float = 0.2) -> float:
    """Best FLOP/s of a square matrix product in this precision, here and now; what MFU is a share of."""
    size = 8192 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


class History:
    """Figures of a run in long form, kept beside its checkpoints so that no step appears twice after a restart."""

    def __init__(self, uri: str = "", step: int = 0) -> None:
        self.uri = files.join(uri, "history.parquet") if uri else ""
        self.rows: list[Row] = []
        self.committed = 0
        if step and files.exists(self.uri):
            columns = tables.read_table(self.uri).to_pydict()
            rows = zip(columns["step"], columns["epoch"], columns["name"], columns["value"], strict=True)
            self.rows = [row for row in rows if row[0] <= step]
            self.committed = len(self.rows)

    def add(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """Figures of one step."""
        self.rows += [(step, epoch, name, value) for name, value in figures.items()]

    def take(self) -> tuple[list[Row], list[Row]]:
        """All rows so far, and those since the last call."""
        new, self.committed = self.rows[self.committed :], len(self.rows)
        return list(self.rows), new

    def write(self, rows: list[Row]) -> None:
        """Write rows to history.parquet."""
        step, epoch, name, value = zip(*rows, strict=True) if rows else ((), (), (), ())
        table = {
            "step": pa.array(step, pa.int64()), "epoch": pa.array(epoch, pa.int32()),
            "name": pa.array(name, pa.string()), "value": pa.array(value, pa.float64()),
        }  # fmt: skip
        tables.write_table(self.uri, pa.table(table))


class _Flat:
    """All gradients as views of one buffer, with room for a few figures behind them."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        self.buffer = torch.zeros(self.size + 16, device=device)

    def zero(self) -> None:
        self.buffer.zero_()
        start = 0
        for p in self.parameters:
            p.grad = self.buffer[start : start + p.numel()].view_as(p)
            start += p.numel()

    def reduce(self, figures: dict[str, Tensor], context: Context) -> dict[str, float]:
        """Sum gradients and figures over the workers; returns the figures and the norm of the gradient."""
        tail = torch.stack([v.detach().float().reshape(()) for v in figures.values()])
        assert len(tail) <= 16, "more figures than the buffer has room for"
        self.buffer[self.size : self.size + len(tail)] = tail
        context.all_reduce(self.buffer)
        norm = torch.linalg.vector_norm(self.buffer[: self.size])
        values = torch.cat([self.buffer[self.size : self.size + len(tail)], norm[None]]).tolist()  # the step's one wait
        return dict(zip([*figures, "grad_norm"], values, strict=True))

    def clip(self, norm: float, largest: float) -> None:
        if largest > 0 and norm > largest:
            self.buffer[: self.size] *= largest / (norm + 1e-6)


def fit(
    model: Any,
    task: Task[Any, Any],
    settings: training.Train,
    context: Context,
    *,
    uri: str = "",
    identity: str = "",
    until: int = 0,
) -> list[Row]:
    """Train a model in place.

    Args:
        model: its parameters with `requires_grad` are trained.
        task: what to train on.
        settings: optimisation; epochs and batches are the task's business.
        context: this worker.
        uri: folder of checkpoints (`steps/`) and history; training goes on from the latest one there. Empty = none.
        identity: fingerprint of what is trained; a checkpoint of another one is refused.
        until: stop after this step, which is then a checkpoint's; a later call goes on as if there had been no stop. 0 = the end.

    Returns:
        All figures logged, earlier sessions' included.

    Raises:
        UserError: a loss or gradient is not finite (it names the step), or a checkpoint cannot be used.
    """
    device, num_steps = context.device, task.num_steps
    last = min(until or num_steps, num_steps)
    model.to(device).train()
    optimizer, flat = make_optimizer(model, settings), _Flat(model, device)
    state = checkpoints.load_step(uri, model, optimizer) if uri else None
    if state is not None and state.details.get("identity") != identity:
        msg = f"{uri}/steps: checkpoints of another run; choose another output, or remove {uri} to start again"
        raise UserError(msg)
    start = state.step if state is not None else 0
    starts = torch.tensor([float(start)], device=device)
    context.all_reduce(starts)
    if starts.item() != start * context.world_size:
        msg = f"{uri}/steps changed while the workers read it: another run is writing there"
        raise RuntimeError(msg)
    history = History(uri, start)
    if context.rank == 0 and history.rows:
        context.recover(history.rows)
    if context.rank == 0 and settings.warmup_steps >= num_steps > start:
        warn(
            f"train.warmup_steps = {settings.warmup_steps}: the run has {num_steps} steps, so train.lr is never reached"
        )
    if settings.compile:
        model.compile(dynamic=True)
    clock = _Clock(measure_peak(device, settings.precision) * context.world_size)
    with (
        checkpoints.Saver(uri, keep=settings.keep_checkpoints) as saver,
        Prefetch(lambda step: task.work(step, context.rank, context.world_size), start, max(start, last)) as ahead,
    ):
        for step, work in enumerate(ahead, start):
            lr = learning_rate(settings, step, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            flat.zero()
            figures = task.backward(model, work, context)
            sums = {name: torch.tensor(float(getattr(work, name)), device=device) for name in _Clock.COUNTS}
            values = flat.reduce(figures | sums, context)
            counted = {name: values.pop(name) for name in _Clock.COUNTS}
            if not all(map(math.isfinite, values.values())):
                bad = ", ".join(f"{k} = {v}" for k, v in values.items() if not math.isfinite(v))
                msg = f"step {step + 1} (epoch {work.epoch}): {bad}; lower train.lr, or set train.clip or more warm-up"
                raise UserError(msg)
            flat.clip(values["grad_norm"], settings.clip)
            optimizer.step()
            done = step + 1
            clock.add(counted)
            if done % settings.log_steps == 0 or done in (num_steps, 1):
                row = values | {"lr": lr} | clock.figures(ahead.waited, device)
                history.add(done, work.epoch, row)
                if context.rank == 0:
                    context.report(done, row)
            if uri and (done % settings.checkpoint_steps == 0 or done == last):
                if context.rank == 0:
                    rows, new = history.take()
                    saver.save(
                        done, model, optimizer, {"identity": identity, "epoch": work.epoch},
                        before=partial(history.write, rows), after=partial(context.commit, new),
                    )  # fmt: skip
                clock.pause(ahead.waited)
    context.barrier()
    return history.rows


class _Clock:
    """Rates between two logged steps."""

    COUNTS = ("num_cells", "num_tokens", "flops")

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.began = time.perf_counter()
        self.sums, self.waited = dict.fromkeys(self.COUNTS, 0.0), 0.0

    def add(self, counted: dict[str, float]) -> None:
        for name, value in counted.items():
            self.sums[name] += value

    def pause(self, waited: float) -> None:
        """Begin anew after a checkpoint, whose own time is no training time."""
        self.began, self.waited = time.perf_counter(), waited
        self.sums = dict.fromkeys(self.COUNTS, 0.0)

    def figures(self, waited: float, device: torch.device) -> dict[str, float]:
        spent = max(time.perf_counter() - self.began, 1e-9)
        out = {
            "cells_per_s": self.sums["num_cells"] / spent,
            "tokens_per_s": self.sums["num_tokens"] / spent,
            "mfu": self.sums["flops"] / spent / self.peak,
            "wait_share": min(1.0, (waited - self.waited) / spent),
            "memory_gb": memory_gb(device),
        }
        self.pause(waited)
        return out


def memory_gb(device: torch.device) -> float:
    """Largest memory so far in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
