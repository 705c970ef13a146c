"""The training loop, for pretraining and fine-tuning, in plain PyTorch.

A `TrainingTask` gives the work of a step and computes its gradients. The loop does the rest: schedule, optimizer,
reduction over workers, metrics and checkpoints. All gradients are views of one buffer, with the step's metrics at its
end, so that a step has one reduction and one wait for the device. Losses are sums over all workers divided by global
counts, so they do not depend on how a batch is split.
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
from mixgf.training.prefetch import Prefetch
from mixgf.training.worker_group import Context, Group, MetricRow, autocast

W = TypeVar("W", bound="StepWork")
M_contra = TypeVar("M_contra", bound=nn.Module, contravariant=True)


class StepWork(Protocol):
    """A worker's share of one step."""

    @property
    def epoch(self) -> int: ...
    @property
    def num_cells(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def flops(self) -> float: ...


class TrainingTask(Protocol[M_contra, W]):
    """What `fit` trains on: the work of each step, and its gradients."""

    @property
    def num_steps(self) -> int: ...

    def work(self, step: int, rank: int, world_size: int) -> W:
        """A worker's share of a step; a pure function, called in a background thread."""

    def backward(self, model: M_contra, work: W, group: Group) -> dict[str, Tensor]:
        """Add gradients to the model; returns scalars, among them `loss`, whose sums over workers are the metrics."""


@dataclass(frozen=True, slots=True)
class BatchWork:
    """Work of a `LossTask`: micro batches, and the count by which the sums of all workers are divided."""

    batches: list[Batch]
    count: float
    epoch: int = 0
    flops: float = 0.0

    @property
    def num_cells(self) -> int:
        """Number of cells of this worker."""
        return sum(batch.num_cells for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of this worker."""
        return sum(batch.num_tokens for batch in self.batches)


@dataclass(frozen=True)
class LossTask(Generic[M_contra]):
    """A training task made of two functions, for fine-tuning.

    Args:
        num_steps: total number of optimizer steps.
        batches: (step, rank, world_size) to the worker's micro batches and the global count; a pure function.
        loss: (model, batch) to sums over the batch's cells, among them `loss`; each is divided by the count.
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
        """Add the gradients of the mean loss over micro batches; returns the metrics."""
        figures: dict[str, Tensor] = {"loss": torch.zeros((), device=group.device)}
        for batch in work.batches:
            with autocast(group.device, self.precision):
                sums = self.loss(model, batch.to(group.device))
            (sums["loss"] / work.count).backward()  # type: ignore[no-untyped-call]
            for name, value in sums.items():
                figures[name] = figures.get(name, torch.zeros((), device=group.device)) + value.detach() / work.count
        return figures


def learning_rate(settings: training.Train, step: int, num_steps: int) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then `train.schedule` to the end of training."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    scale = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.lr * scale[settings.schedule]


def _set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def make_optimizer(model: nn.Module, settings: training.Train) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no weight decay for biases and layer norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, fused=True)


def measure_peak(device: torch.device, precision: str, *, seconds: float = 0.2) -> float:
    """Measure the peak FLOP/s of a square matrix product on a device; MFU is a share of it."""
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
    """Metrics of a run, stored beside its checkpoints (history.parquet) so that no step appears twice after a restart."""

    def __init__(self, uri: str = "", step: int = 0) -> None:
        self.uri = files.join(uri, "history.parquet") if uri else ""
        self.rows: list[MetricRow] = []
        self.committed = 0
        if step and files.exists(self.uri):
            columns = tables.read_table(self.uri).to_pydict()
            rows = zip(columns["step"], columns["epoch"], columns["name"], columns["value"], strict=True)
            self.rows = [row for row in rows if row[0] <= step]
            self.committed = len(self.rows)

    def add(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """Add the metrics of one step."""
        self.rows += [(step, epoch, name, value) for name, value in figures.items()]

    def drain(self) -> tuple[list[MetricRow], list[MetricRow]]:
        """All rows, and the rows since the last call."""
        new, self.committed = self.rows[self.committed :], len(self.rows)
        return list(self.rows), new

    def publishers(self, context: Context) -> tuple[Callable[[], None], Callable[[], None]]:
        """Two functions for a checkpoint: one writes all rows so far, the other commits those since the last call."""
        rows, new = self.drain()
        return partial(self.write_rows, rows), partial(context.commit, new)

    def write_rows(self, rows: list[MetricRow]) -> None:
        """Write rows to history.parquet."""
        step, epoch, name, value = zip(*rows, strict=True) if rows else ((), (), (), ())
        table = {
            "step": pa.array(step, pa.int64()), "epoch": pa.array(epoch, pa.int32()),
            "name": pa.array(name, pa.string()), "value": pa.array(value, pa.float64()),
        }  # fmt: skip
        tables.write_table(self.uri, pa.table(table))


class _FlatGradients:
    """All gradients as views of one buffer, with 16 values behind them for metrics."""

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
        """Sum gradients and metrics over the workers; returns the metrics and the norm of the gradient."""
        tail = torch.stack([v.detach().float().reshape(()) for v in figures.values()])
        assert len(tail) <= 16, "more figures than the buffer has room for"
        self.buffer[self.size : self.size + len(tail)] = tail
        context.all_reduce(self.buffer)
        norm = torch.linalg.vector_norm(self.buffer[: self.size])
        # the step waits for the device only here
        values = torch.cat([self.buffer[self.size : self.size + len(tail)], norm[None]]).tolist()
        return dict(zip([*figures, "grad_norm"], values, strict=True))

    def clip(self, norm: float, largest: float) -> None:
        if largest > 0 and norm > largest:
            self.buffer[: self.size] *= largest / (norm + 1e-6)


def fit(
    model: Any,
    task: TrainingTask[Any, Any],
    settings: training.Train,
    context: Context,
    *,
    uri: str = "",
    identity: str = "",
    until: int = 0,
) -> list[MetricRow]:
    """Train a model in place.

    Args:
        model: parameters with `requires_grad` are trained.
        task: what to train on.
        settings: optimisation and logging; the task decides on epochs and batches.
        context: this worker.
        uri: folder of checkpoints (`steps/`) and history; training resumes from the latest checkpoint. Empty = none.
        identity: fingerprint of the training; a checkpoint with another one is an error.
        until: stop after this step, with a checkpoint; a later call resumes exactly. 0 = the end of training.

    Returns:
        All logged metrics, those before a restart included.

    Raises:
        UserError: a loss or gradient is not finite, or a checkpoint cannot be used.
    """
    device, num_steps = context.device, task.num_steps
    last = min(until or num_steps, num_steps)
    model.to(device).train()
    optimizer, flat = make_optimizer(model, settings), _FlatGradients(model, device)
    start = _resume(uri, identity, model, optimizer, context)
    history = _recovered_history(uri, start, context)
    if context.rank == 0 and (warmup := settings.warmup_steps) >= num_steps > start:
        warn(f"train.warmup_steps = {warmup}: the run has {num_steps} steps, so train.lr is never reached")
    if settings.compile:
        model.compile(dynamic=True)
    clock = _RateMeter(measure_peak(device, settings.precision) * context.world_size)
    with (
        checkpoints.CheckpointWriter(uri, keep=settings.keep_checkpoints) as writer,
        Prefetch(lambda step: task.work(step, context.rank, context.world_size), start, max(start, last)) as ahead,
    ):
        for step, work in enumerate(ahead, start):
            lr = _set_learning_rate(optimizer, learning_rate(settings, step, num_steps))
            flat.zero()
            figures = task.backward(model, work, context)
            values, counted = _reduce_step(flat, figures, work, context)
            _require_finite(values, step, work.epoch)
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
                    before, after = history.publishers(context)
                    details = {"identity": identity, "epoch": work.epoch}
                    writer.save(done, model, optimizer, details, before=before, after=after)
                clock.pause(ahead.waited)
    context.barrier()
    return history.rows


def _resume(
    uri: str, identity: str, model: nn.Module, optimizer: torch.optim.Optimizer, context: Context
) -> int:  # fmt: skip
    """Restore the latest checkpoint, if there is one; returns the number of steps done, which all workers must agree on."""
    state = checkpoints.load_step(uri, model, optimizer) if uri else None
    if state is not None and state.details.get("identity") != identity:
        msg = f"{uri}/steps: checkpoints of another run; choose another output, or remove {uri} to start again"
        raise UserError(msg)
    start = state.step if state is not None else 0
    starts = torch.tensor([float(start)], device=context.device)
    context.all_reduce(starts)
    if starts.item() != start * context.world_size:
        msg = f"{uri}/steps changed while the workers read it: another run is writing there"
        raise RuntimeError(msg)
    return start


def _recovered_history(uri: str, start: int, context: Context) -> History:
    """Metrics up to step `start`; on rank 0 they are handed to the context, too."""
    history = History(uri, start)
    if context.rank == 0 and history.rows:
        context.recover(history.rows)
    return history


def _reduce_step(
    flat: _FlatGradients, figures: dict[str, Tensor], work: StepWork, context: Context
) -> tuple[dict[str, float], dict[str, float]]:
    """Sum gradients over the workers; returns the metrics of the step, and its cells, tokens and FLOP."""
    sums = {name: torch.tensor(float(getattr(work, name)), device=context.device) for name in _RateMeter.COUNTS}
    values = flat.reduce(figures | sums, context)
    counted = {name: values.pop(name) for name in _RateMeter.COUNTS}
    return values, counted


def _require_finite(values: dict[str, float], step: int, epoch: int) -> None:
    if not all(map(math.isfinite, values.values())):
        bad = ", ".join(f"{k} = {v}" for k, v in values.items() if not math.isfinite(v))
        msg = f"step {step + 1} (epoch {epoch}): {bad}; lower train.lr, or set train.clip or more warm-up"
        raise UserError(msg)


class _RateMeter:
    """Rates between two logged steps: cells, tokens and FLOP per second, share of time spent waiting, memory."""

    COUNTS = ("num_cells", "num_tokens", "flops")

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.began = time.perf_counter()
        self.sums, self.waited = dict.fromkeys(self.COUNTS, 0.0), 0.0

    def add(self, counted: dict[str, float]) -> None:
        for name, value in counted.items():
            self.sums[name] += value

    def pause(self, waited: float) -> None:
        """Start a new interval; the time of a checkpoint is not counted as training time."""
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
    """Peak memory in GB, of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
