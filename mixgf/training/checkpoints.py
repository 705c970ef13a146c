"""Moved here from mixgf/checkpoint.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mixgf.console import warn
from mixgf.encoder.bert import MaskedModel
from mixgf.encoder.checkpoint import (
    MOMENTS,
    WEIGHTS,
    load_weights,
    publish_checkpoint,
    read_tensors,
    restore_hint,
    write_tensors,
)
from mixgf.errors import UserError
from mixgf.storage import files
from mixgf.storage.artifacts import Record


@dataclass(frozen=True, slots=True)
class State:
    """What training needs beside the weights to go on as if nothing had happened."""

    step: int
    """Optimizer steps done."""
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Training state on the host, by name: a training step that follows does not change it."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, into: Snapshot | None = None) -> Snapshot:
    """Copies on the host of all weights and moments as they are now; `into` gives its memory to be used again."""
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {
        f"{names[id(p)]}/{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
    }
    return Snapshot(
        _copies(dict(model.named_parameters()), into.weights if into else {}), _copies(moments, into.moments if into else {})
    )  # fmt: skip


def _copies(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: into[name].copy_(tensor.detach())
        if name in into
        else tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def step_folder(uri: str, step: int) -> str:
    """Where the checkpoint of one step lies."""
    return files.join(uri, "steps", f"{step:08d}")


def write_step(uri: str, step: int, taken: Snapshot, details: dict[str, Any]) -> str:
    """Publish a resumable checkpoint under `uri`/steps; returns its folder."""
    folder = step_folder(uri, step)
    checksums = {
        WEIGHTS: write_tensors(files.join(folder, WEIGHTS), taken.weights),
        MOMENTS: write_tensors(files.join(folder, MOMENTS), taken.moments),
    }
    state = {"step": step, "files": checksums, "details": details}
    files.write_json(files.join(folder, "state.json"), state)
    return folder


def save_step(uri: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, details: dict[str, Any]) -> str:
    """Publish a resumable checkpoint of this moment and wait for it; returns its folder."""
    return write_step(uri, step, snapshot(model, optimizer), details)


class Saver:
    """Publishes checkpoints while training goes on: a copy at once, the writing in a background thread, one at a time.

    `save` waits for the checkpoint before it, so that memory holds one copy and checkpoints appear in order; what went
    wrong in the thread is raised there, or by `close`. Use as a context manager: leaving it finishes the last checkpoint.

    Args:
        uri: folder of the checkpoints.
        keep: how many complete checkpoints stay.
    """

    def __init__(self, uri: str, *, keep: int) -> None:
        self.uri, self.keep = uri, keep
        self._taken: Snapshot | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mixgf-checkpoint")
        self._open: Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        details: dict[str, Any],
        *,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        """Begin to publish a checkpoint of this moment.

        Args:
            step: optimizer steps done.
            model: its weights.
            optimizer: its moments.
            details: what else `load_step` gives back.
            before: called in the thread before the checkpoint is written: what must be there when it counts.
            after: called in the thread when it counts.
        """
        self.wait()
        taken = self._taken = snapshot(model, optimizer, self._taken)

        def publish() -> None:
            before()
            write_step(self.uri, step, taken, details)
            after()
            prune(self.uri, self.keep)

        self._open = self._thread.submit(publish)

    def wait(self) -> None:
        """Wait until the latest checkpoint is there."""
        if self._open is not None:
            begun, self._open = self._open, None
            begun.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            warn(f"{self.uri}/steps: the latest checkpoint was not written ({type(error).__name__}: {error})")
        finally:
            self._thread.shutdown()


def _steps(uri: str) -> list[int]:
    names = [name.rstrip("/").rsplit("/", 1)[-1] for name in files.list_dir(files.join(uri, "steps"))]
    return [int(name) for name in sorted(names) if name.isdigit()]


def complete_steps(uri: str) -> list[int]:
    """Steps of all complete checkpoints under `uri`/steps, ascending."""
    return [n for n in _steps(uri) if files.exists(files.join(step_folder(uri, n), "state.json"))]


def load_step(uri: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> State | None:
    """Restore the latest complete checkpoint under `uri`/steps in place; None when there is none.

    Raises:
        UserError: there is one, but it cannot be read or is of another model.
    """
    steps = complete_steps(uri)
    if not steps:
        return None
    folder = step_folder(uri, steps[-1])
    where = files.join(folder, "state.json")
    try:
        state = files.read_json(where)
        step, checksums, details = int(state["step"]), dict(state["files"]), dict(state["details"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(restore_hint(f"{where}: not a readable state ({error!r})", where)) from None
    load_weights(model, read_tensors(files.join(folder, WEIGHTS), checksums[WEIGHTS]), folder)
    moments = read_tensors(files.join(folder, MOMENTS), checksums[MOMENTS])
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            mine = {k.rsplit("/", 1)[1]: v for k, v in moments.items() if k.rsplit("/", 1)[0] == names[id(p)]}
            device = {k: v.to(p.device) if v.dim() or group.get("fused") else v for k, v in mine.items()}
            optimizer.state[p] = device
    return State(step, details)


def promote(uri: str, record: Record, model: MaskedModel, **about: Any) -> Record:
    """Make the weights of the latest complete checkpoint under `uri`/steps the artifact's; arguments as `publish`."""
    load_step_weights(uri, complete_steps(uri)[-1], model)
    return publish_checkpoint(uri, record, model, **about)


def load_step_weights(uri: str, step: int, model: MaskedModel) -> None:
    """Copy the weights of the complete checkpoint of one step under `uri`/steps into a model."""
    folder = step_folder(uri, step)
    checksums = files.read_json(files.join(folder, "state.json"))["files"]
    load_weights(model, read_tensors(files.join(folder, WEIGHTS), checksums[WEIGHTS]), folder)


def prune(uri: str, keep: int) -> None:
    """Remove all but the latest `keep` complete checkpoints, and what a killed writer left before them."""
    kept = complete_steps(uri)[-keep:]
    for step in _steps(uri):
        if kept and step < kept[0]:
            folder = step_folder(uri, step)
            files.remove(files.join(folder, "state.json"))  # first, so that no half-removed checkpoint counts
            files.remove(folder)
