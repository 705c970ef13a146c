"""Training state to resume from: one folder `steps/<NNNNNNNN>` per checkpoint, written while training goes on.

A folder holds the weights and the optimizer's moments as safetensors, and `state.json`, which is written last and makes
the checkpoint complete. A complete checkpoint that cannot be read is an error; training does not start from step 0 again.
"""

from __future__ import annotations

import re
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
from mixgf.storage.sealed import read_sealed, write_sealed

_OWN = re.compile("|".join(map(re.escape, (WEIGHTS, MOMENTS, "state.json"))))
"""Files of a checkpoint."""


@dataclass(frozen=True, slots=True)
class State:
    """State of a resumed run, beside weights and moments."""

    step: int
    """Optimizer steps done."""
    details: dict[str, Any]
    """What `CheckpointWriter.save` was given."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copy of the training state on the host, by name of the parameter."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def take_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, into: Snapshot | None = None) -> Snapshot:
    """Copy all weights and moments to the host; the memory of `into` is reused."""
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
    """URI of the checkpoint of one step."""
    return files.join(uri, "steps", f"{step:08d}")


def write_step(uri: str, step: int, taken: Snapshot, details: dict[str, Any]) -> str:
    """Write a snapshot as the checkpoint of a step under `uri`/steps; returns its folder."""
    folder = step_folder(uri, step)
    checksums = {
        WEIGHTS: write_tensors(files.join(folder, WEIGHTS), taken.weights),
        MOMENTS: write_tensors(files.join(folder, MOMENTS), taken.moments),
    }
    state = {"step": step, "files": checksums, "details": details}
    write_sealed(files.join(folder, "state.json"), state)
    return folder


def save_step(uri: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, details: dict[str, Any]) -> str:
    """Write a checkpoint of the present state and wait until it is complete; returns its folder."""
    return write_step(uri, step, take_snapshot(model, optimizer), details)


class CheckpointWriter:
    """Writes checkpoints in a background thread while training goes on, one at a time.

    `save` copies the state and returns. It first waits for the checkpoint before, so that memory holds one copy and
    checkpoints appear in order. Errors of the thread are raised by the next `save`, `wait`, or at the end of the context.

    Args:
        uri: folder of the run.
        keep: number of complete checkpoints to keep.
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
        spare: int | None = None,
    ) -> None:
        """Start to write a checkpoint of the present state.

        Args:
            step: optimizer steps done.
            model: the model.
            optimizer: the optimizer.
            details: further state, which `load_step` returns.
            before: called in the thread before the checkpoint is written.
            after: called in the thread when the checkpoint is complete.
            spare: an older step whose checkpoint is kept, too.
        """
        self.wait()
        taken = self._taken = take_snapshot(model, optimizer, self._taken)

        def publish() -> None:
            before()
            write_step(self.uri, step, taken, details)
            after()
            remove_old_steps(self.uri, self.keep, spare)

        self._open = self._thread.submit(publish)

    def wait(self) -> None:
        """Wait until the latest checkpoint is complete."""
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
    return [int(name) for name in sorted(names) if re.fullmatch("[0-9]{8}", name)]


def complete_steps(uri: str) -> list[int]:
    """Steps of all complete checkpoints under `uri`/steps, ascending."""
    return [n for n in _steps(uri) if files.exists(files.join(step_folder(uri, n), "state.json"))]


def load_step(uri: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> State | None:
    """Restore model and optimizer, in place, from the latest complete checkpoint under `uri`/steps; None without one.

    Raises:
        UserError: the checkpoint cannot be read, or belongs to another model.
    """
    steps = complete_steps(uri)
    if not steps:
        return None
    folder = step_folder(uri, steps[-1])
    where = files.join(folder, "state.json")
    try:
        state = read_sealed(where)
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


def publish_step(uri: str, step: int, record: Record, model: MaskedModel, **about: Any) -> Record:
    """Publish the weights of the complete checkpoint of a step as the artifact; arguments as `publish_checkpoint`."""
    load_step_weights(uri, step, model)
    return publish_checkpoint(uri, record, model, **about)


def last_and_best(uri: str) -> tuple[int, int]:
    """Step of the latest complete checkpoint, and of the one with the best weights (`Selection`), or the same without one."""
    last = complete_steps(uri)[-1]
    state = read_sealed(files.join(step_folder(uri, last), "state.json"))["details"].get("selection")
    return last, int(state["best_step"]) if state else last


def load_step_weights(uri: str, step: int, model: nn.Module) -> None:
    """Copy the weights of the complete checkpoint of a step into a model."""
    folder = step_folder(uri, step)
    checksums = read_sealed(files.join(folder, "state.json"))["files"]
    load_weights(model, read_tensors(files.join(folder, WEIGHTS), checksums[WEIGHTS]), folder)


def remove_old_steps(uri: str, keep: int, spare: int | None = None) -> None:
    """Remove all but the latest `keep` complete checkpoints and that of step `spare`, and incomplete ones before them."""
    kept = complete_steps(uri)[-keep:]
    for step in _steps(uri):
        if kept and step < kept[0] and step != spare:
            # the state first, so that a partly removed checkpoint is incomplete; files of others stay
            files.remove(files.join(step_folder(uri, step), "state.json"))
            files.remove_matching(step_folder(uri, step), _OWN)
