"""The training loop, for pretraining and fine-tuning, in plain PyTorch.

A `TrainingTask` gives the work of a step as micro batches, and their losses. The loop does the rest: gradients, schedule,
optimizer, metrics and checkpoints. In a group of workers, DistributedDataParallel sums the gradients while the backward
pass of the last micro batch goes on. Metrics are summed in one small message, and the step waits for the device once.
Losses are sums over all workers divided by global counts, so they do not depend on how a batch is split.
"""

from __future__ import annotations

import contextlib
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
from torch.nn.parallel import DistributedDataParallel

from mixgf import termination
from mixgf.config import training
from mixgf.console import warn
from mixgf.encoder.batch import Batch
from mixgf.encoder.prefetch import Prefetch
from mixgf.errors import UserError
from mixgf.storage import files, tables
from mixgf.training import checkpoints
from mixgf.training.gradient_sums import settle_buckets
from mixgf.training.selection import Selection
from mixgf.training.worker_group import Asked, Context, Group, MetricRow, autocast

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
    """What `fit` trains on: the work of each step, and its losses.

    A step calls `forward` for each micro batch, inside DistributedDataParallel, and `loss` with its outputs. `gather` comes
    between them where a loss needs other micro batches or other workers.
    """

    @property
    def num_steps(self) -> int: ...

    def is_short(self, step: int) -> bool:
        """Whether the batch of a step (from 0) is so small, at the end of an epoch, that its figures say little."""

    def work(self, step: int, rank: int, world_size: int) -> W:
        """A worker's share of a step; a pure function, called in a background thread."""

    def micro_batches(self, work: W, device: torch.device) -> list[Any]:
        """The share as micro batches on a device, at least one, which may be empty."""

    def is_empty(self, micro: Any) -> bool:
        """Whether a micro batch has nothing to compute; `forward` is not called for it."""

    def forward(self, model: M_contra, micro: Any) -> Any:
        """What the losses of a micro batch need of the model. Every trained parameter takes part in it."""

    def gather(self, model: M_contra, work: W, micros: list[Any], group: Group, outputs: Any) -> Any:
        """What the losses need of other micro batches and workers; `outputs` of `forward` where it has run already."""

    def loss(self, outputs: Any, micro: Any, work: W, gathered: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to differentiate for a micro batch, and figures to sum over the micro batches."""

    def metrics(self, sums: dict[str, Tensor], gathered: Any) -> dict[str, Tensor]:
        """Scalars, among them `loss`, whose sums over workers are the metrics; the same names on every worker."""


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
        sums: (model, batch) to sums over the batch's cells, among them `loss`; each is divided by the count.
        precision: `fp32` or `bf16`.
        names: of these sums.
    """

    num_steps: int
    batches: Callable[[int, int, int], BatchWork]
    sums: Callable[[Any, Batch], dict[str, Tensor]]
    precision: str = "fp32"
    names: tuple[str, ...] = ("loss",)

    @staticmethod
    def is_short(step: int) -> bool:
        """Figures are means over cells, which a small batch has, too."""
        return False

    def work(self, step: int, rank: int, world_size: int) -> BatchWork:
        """The worker's micro batches."""
        return self.batches(step, rank, world_size)

    @staticmethod
    def micro_batches(work: BatchWork, device: torch.device) -> list[Batch]:
        """The worker's micro batches on a device."""
        return [batch.to(device) for batch in work.batches]

    @staticmethod
    def is_empty(micro: Batch) -> bool:
        """Whether a micro batch has no cells."""
        return micro.num_cells == 0

    def forward(self, model: M_contra, micro: Batch) -> dict[str, Tensor]:
        """Sums over the cells of a micro batch."""
        with autocast(micro.ids_T.device, self.precision):
            return self.sums(model, micro)

    def gather(
        self, model: M_contra, work: BatchWork, micros: list[Batch], group: Group, outputs: object
    ) -> torch.device:
        """Nothing of other workers is needed; the device."""
        return group.device

    def loss(
        self, outputs: dict[str, Tensor], micro: Batch, work: BatchWork, gathered: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The micro batch's part of the mean loss, and of all means."""
        means = {name: outputs[name].detach() / work.count for name in self.names}
        return outputs["loss"] / work.count, means

    def metrics(self, sums: dict[str, Tensor], gathered: torch.device) -> dict[str, Tensor]:
        """Means over the global batch, this worker's part."""
        return {name: sums.get(name, torch.zeros((), device=gathered)) for name in self.names}


class TaskForward(nn.Module):
    """What DistributedDataParallel wraps: a micro batch in, the outputs of `TrainingTask.forward` out.

    Without a micro batch, or for an empty one, the output is 0 and depends on every trained parameter, because
    DistributedDataParallel waits for a gradient of each.
    """

    def __init__(self, model: nn.Module, task: TrainingTask[Any, Any]) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, micro: Any) -> Any:
        if micro is None or self.task.is_empty(micro):
            zeros = [(p * 0.0).sum() for p in self.model.parameters() if p.requires_grad]
            return torch.stack(zeros).sum()
        return self.task.forward(self.model, micro)


def compute_gradients(module: nn.Module, work: StepWork, group: Group) -> dict[str, Tensor]:
    """Add the gradients of a step to the model's, over all workers if the module is in DistributedDataParallel.

    Args:
        module: A `TaskForward`, or one in DistributedDataParallel.
        work: This worker's share of the step.
        group: The workers.

    Returns:
        Scalars whose sums over the workers are the metrics.
    """
    parallel = module if isinstance(module, DistributedDataParallel) else None
    inner = module if parallel is None else parallel.module
    assert isinstance(inner, TaskForward)
    model, task = inner.model, inner.task
    micros = task.micro_batches(work, group.device)
    outputs = module(micros[0]) if len(micros) == 1 and not task.is_empty(micros[0]) else None
    gathered = task.gather(model, work, micros, group, outputs)
    sums: dict[str, Tensor] = {}
    for i, micro in enumerate(micros):
        is_last = i == len(micros) - 1
        with contextlib.nullcontext() if parallel is None or is_last else parallel.no_sync():
            if task.is_empty(micro):
                if parallel is not None:
                    parallel(micro).backward()
                continue
            outputs = outputs if len(micros) == 1 else module(micro)
            loss, figures = task.loss(outputs, micro, work, gathered)
            del outputs
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        for name, value in figures.items():
            sums[name] = sums[name] + value if name in sums else value
    return task.metrics(sums, gathered)


def learning_rate(settings: training.Train, step: int, num_steps: int) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then `train.schedule` to the end of training."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    scale = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return settings.lr * scale[settings.schedule]


def _is_logged(task: TrainingTask[Any, Any], done: int, every: int) -> bool:
    """Whether a step is logged: every so many steps, the first and the last one, but no step with a short batch."""
    if task.is_short(done - 1):
        return False
    last = task.num_steps - task.is_short(task.num_steps - 1)
    return done % every == 0 or done in (1, last)


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
    """Measure the peak FLOP/s of a product of square random matrices on a device; MFU is a share of it.

    GPUs multiply constants faster than random numbers, with less power.
    """
    size = 8192 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    draws = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=draws).to(dtype)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def final_figures(uri: str, step: int) -> dict[str, float]:
    """The latest figures up to a step of the training in `uri`, by name; none where nothing was logged."""
    history = files.join(uri, "history.parquet")
    if not files.exists(history):
        return {}
    columns = tables.read_table(history).to_pydict()
    rows = zip(columns["step"], columns["name"], columns["value"], strict=True)
    return {name: value for at, name, value in sorted(rows) if at <= step}


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


def fit(
    model: Any,
    task: TrainingTask[Any, Any],
    settings: training.Train,
    context: Context,
    *,
    uri: str = "",
    identity: str = "",
    until: int = 0,
    selection: Selection | None = None,
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
        selection: evaluations in between. The model ends with the last weights; `Selection.restore` gives the best ones.

    Returns:
        All logged metrics, those before a restart included.

    Raises:
        UserError: a loss or gradient is not finite, or a checkpoint cannot be used.
        Terminated: a worker was asked to stop; there is a checkpoint of the last step.
    """
    device, num_steps = context.device, task.num_steps
    last = min(until or num_steps, num_steps)
    model.to(device).train()
    optimizer = make_optimizer(model, settings)
    start = _resume(uri, identity, model, optimizer, context=context, selection=selection)
    history = _recovered_history(uri, start, context)
    if context.rank == 0 and (warmup := settings.warmup_steps) >= num_steps > start:
        warn(f"train.warmup_steps = {warmup}: the run has {num_steps} steps, so train.lr is never reached")
    if settings.compile:
        model.compile(dynamic=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    module = _parallel(model, task, parameters, context, settings.reduce)
    clock = _RateMeter(measure_peak(device, settings.precision) * context.world_size)
    stop = start if selection is not None and selection.ended else max(start, last)
    is_stopped = False
    with (
        termination.listening(),
        checkpoints.CheckpointWriter(uri, keep=settings.keep_checkpoints) as writer,
        Prefetch(lambda step: task.work(step, context.rank, context.world_size), start, stop) as ahead,
    ):
        run = _Run(model, optimizer, context, history, writer, selection, identity, num_steps)
        if start == 0 and run.evaluate(0, 0):
            run.save(0, 0)
            clock.pause(ahead.waited)
        for step, work in enumerate(ahead, start):
            lr = _set_learning_rate(optimizer, learning_rate(settings, step, num_steps))
            optimizer.zero_grad(set_to_none=False)
            figures = compute_gradients(module, work, context)
            values, counted, asked, norm = _reduce_step(parameters, figures, work, context)
            _require_finite(values, step, work.epoch)
            if 0 < settings.clip < values["grad_norm"]:
                nn.utils.clip_grads_with_norm_(parameters, settings.clip, norm)
            optimizer.step()
            done = step + 1
            clock.add(counted)
            if _is_logged(task, done, settings.log_steps):
                run.log(done, work.epoch, values | {"lr": lr} | clock.figures(ahead.waited, device))
            is_best = run.evaluate(done, work.epoch)
            ends = done == last or (selection is not None and selection.ended)
            is_stopped = asked.stop and not ends
            if is_best or ends or any(asked) or done % settings.checkpoint_steps == 0:
                run.save(done, work.epoch)
                clock.pause(ahead.waited)
            if ends or is_stopped:
                break
    context.barrier()
    if is_stopped:
        raise termination.Terminated
    return history.rows


@dataclass(frozen=True, slots=True)
class _Run:
    """What a training leaves behind: logged metrics, evaluations, checkpoints."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    context: Context
    history: History
    writer: checkpoints.CheckpointWriter
    selection: Selection | None
    identity: str
    num_steps: int

    def log(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """Add metrics to the history; rank 0 reports them."""
        self.history.add(step, epoch, figures)
        if self.context.rank == 0:
            self.context.report(step, figures)

    def evaluate(self, step: int, epoch: int) -> bool:
        """Evaluate where it is due; returns whether the weights are the best so far."""
        if self.selection is None or not self.selection.due(step, self.num_steps):
            return False
        figures, is_best = self.selection.update(self.model, step, self.context, in_memory=not self.writer.uri)
        self.log(step, epoch, figures)
        return is_best

    def save(self, step: int, epoch: int) -> None:
        """Start to write a checkpoint, on rank 0."""
        if not self.writer.uri or self.context.rank > 0:
            return
        before, after = self.history.publishers(self.context)
        details: dict[str, Any] = {"identity": self.identity, "epoch": epoch}
        spare = None
        if self.selection is not None:
            details["selection"], spare = self.selection.state(), self.selection.best_step
        self.writer.save(step, self.model, self.optimizer, details, before=before, after=after, spare=spare)


def _parallel(
    model: nn.Module, task: TrainingTask[Any, Any], parameters: list[nn.Parameter], context: Context, reduce: str
) -> nn.Module:
    """The forward pass as a module that sums gradients over the workers; every parameter has a gradient of zeros."""
    module = context.parallel(TaskForward(model, task), reduce)
    settle_buckets(module)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return module


def _resume(
    uri: str, identity: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, context: Context,
    selection: Selection | None,
) -> int:  # fmt: skip
    """Restore the latest checkpoint, if there is one; returns the number of steps done, which all workers must agree on."""
    state = checkpoints.load_step(uri, model, optimizer) if uri else None
    if state is not None and state.details.get("identity") != identity:
        msg = f"{uri}/steps: checkpoints of another run; choose another output, or remove {uri} to start again"
        raise UserError(msg)
    start = state.step if state is not None else 0
    if state is not None and selection is not None:
        selection.load(state.details["selection"])
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
    parameters: list[nn.Parameter], figures: dict[str, Tensor], work: StepWork, context: Context
) -> tuple[dict[str, float], dict[str, float], Asked, Tensor]:
    """Sum metrics over the workers.

    Returns:
        The metrics with the norm of the gradient, the counts of the step, what any worker was asked to do, and the norm as tensor.
    """
    mine = [float(getattr(work, name)) for name in _RateMeter.COUNTS] + [float(flag) for flag in context.asked()]
    counts = torch.tensor(mine, device=context.device)
    row = torch.cat([torch.stack([v.detach().float().reshape(()) for v in figures.values()]), counts])
    context.all_reduce(row)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    values = torch.cat([row, norm[None]]).tolist()  # the step waits for the device only here
    counts_and_flags = values[len(figures) : -1]
    counted = dict(zip(_RateMeter.COUNTS, counts_and_flags, strict=False))
    asked = context.agree(Asked(*(flag > 0 for flag in counts_and_flags[len(counted) :])))
    return dict(zip(figures, values, strict=False)) | {"grad_norm": values[-1]}, counted, asked, norm


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
