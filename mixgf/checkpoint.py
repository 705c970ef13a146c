"""Weights and training state in storage: safetensors and JSON, never pickle.

A resumable checkpoint is a folder `steps/<NNNNNNNN>`: model and optimizer as safetensors, then `state.json`, written last,
which makes it count. A checkpoint with a state that cannot be read is an error, never a silent start from step 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from mixgf import artifacts, config, storage
from mixgf.artifacts import Record
from mixgf.config import UserError
from mixgf.dataset import Corpus
from mixgf.model import Encoder, MaskedModel
from mixgf.progress import warn

KIND, SCHEMA = "checkpoint", 1
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"


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


def write_tensors(uri: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors as one safetensors file; returns its bytes and SHA-256."""
    data = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    storage.write_bytes(uri, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_tensors(uri: str, expected: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, after a check of its hash where one is known."""
    try:
        data = storage.read_bytes(uri)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected["sha256"]:
            msg = f"{uri}: not the bytes that were written"
            raise UserError(_lost(msg, uri))
        return load_tensors(data)
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        raise UserError(_lost(f"{uri}: {error}", uri)) from None


def _lost(what: str, uri: str) -> str:
    return f"{what}. Restore it, or remove the folder {uri.rsplit('/', 1)[0]} to go on from what lies before it"


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
    return storage.join(uri, "steps", f"{step:08d}")


def write_step(uri: str, step: int, taken: Snapshot, details: dict[str, Any]) -> str:
    """Publish a resumable checkpoint under `uri`/steps; returns its folder."""
    folder = step_folder(uri, step)
    files = {
        WEIGHTS: write_tensors(storage.join(folder, WEIGHTS), taken.weights),
        MOMENTS: write_tensors(storage.join(folder, MOMENTS), taken.moments),
    }
    state = {"step": step, "files": files, "details": details}
    storage.write_json(storage.join(folder, "state.json"), state)
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
    names = [name.rstrip("/").rsplit("/", 1)[-1] for name in storage.list_dir(storage.join(uri, "steps"))]
    return [int(name) for name in sorted(names) if name.isdigit()]


def complete_steps(uri: str) -> list[int]:
    """Steps of all complete checkpoints under `uri`/steps, ascending."""
    return [n for n in _steps(uri) if storage.exists(storage.join(step_folder(uri, n), "state.json"))]


def load_step(uri: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> State | None:
    """Restore the latest complete checkpoint under `uri`/steps in place; None when there is none.

    Raises:
        UserError: there is one, but it cannot be read or is of another model.
    """
    steps = complete_steps(uri)
    if not steps:
        return None
    folder = step_folder(uri, steps[-1])
    where = storage.join(folder, "state.json")
    try:
        state = storage.read_json(where)
        step, files, details = int(state["step"]), dict(state["files"]), dict(state["details"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(_lost(f"{where}: not a readable state ({error!r})", where)) from None
    load_weights(model, read_tensors(storage.join(folder, WEIGHTS), files[WEIGHTS]), folder)
    moments = read_tensors(storage.join(folder, MOMENTS), files[MOMENTS])
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
    return publish(uri, record, model, **about)


def load_step_weights(uri: str, step: int, model: MaskedModel) -> None:
    """Copy the weights of the complete checkpoint of one step under `uri`/steps into a model."""
    folder = step_folder(uri, step)
    files = storage.read_json(storage.join(folder, "state.json"))["files"]
    load_weights(model, read_tensors(storage.join(folder, WEIGHTS), files[WEIGHTS]), folder)


def prune(uri: str, keep: int) -> None:
    """Remove all but the latest `keep` complete checkpoints, and what a killed writer left before them."""
    kept = complete_steps(uri)[-keep:]
    for step in _steps(uri):
        if kept and step < kept[0]:
            folder = step_folder(uri, step)
            storage.remove(storage.join(folder, "state.json"))  # first, so that no half-removed checkpoint counts
            storage.remove(folder)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a model's parameters; names and shapes must be the same."""
    parameters = dict(model.named_parameters())
    differing = sorted(set(parameters) ^ set(tensors)) or [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(p.shape)}"
        for k, p in parameters.items()
        if p.shape != tensors[k].shape
    ]
    if differing:
        msg = f"{where}: weights of another model ({', '.join(differing[:3])}); name one made with the same config"
        raise UserError(msg)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def publish(
    uri: str,
    record: Record,
    model: MaskedModel,
    *,
    vocabulary: str,
    tokens: config.Tokens,
    objective: config.Objective | None = None,
    counts: dict[str, Any] | None = None,
    files: dict[str, Any] | None = None,
    untrained: np.ndarray | None = None,
) -> Record:
    """Write a model's weights and finish its artifact.

    Args:
        uri: the artifact's folder, already begun.
        record: its plan.
        model: encoder and head.
        vocabulary: hash of the vocabulary.
        tokens: how its sentences are made.
        objective: what it was trained with, if it was.
        counts: counts of the record.
        files: further files that were written.
        untrained: ids, ascending, that nothing was ever trained on (see `untrained`).
    """
    files = (files or {}) | {WEIGHTS: write_tensors(storage.join(uri, WEIGHTS), dict(model.named_parameters()))}
    details = {
        "vocabulary": vocabulary,
        "vocab_size": model.encoder.vocab_size,
        "model": config.to_dict(model.encoder.row),
        "tokens": config.to_dict(tokens),
        "objective": config.to_dict(objective) if objective is not None else None,
    }
    if untrained is not None and len(untrained):
        runs = np.split(untrained, np.flatnonzero(np.diff(untrained) > 1) + 1)
        details["untrained"] = [[int(run[0]), int(run[-1]) + 1] for run in runs]
    return artifacts.finish(uri, record, counts=counts, files=files, details=details)


def untrained(record: Record) -> np.ndarray:
    """Ids of a checkpoint's vocabulary, ascending, whose vectors come from elsewhere and were never trained."""
    runs = [np.arange(start, stop) for start, stop in record.details.get("untrained", ())]
    return np.concatenate([np.empty(0, dtype=np.int64), *runs])


def load_model(uri: str, device: torch.device | str = "cpu") -> tuple[MaskedModel, Record]:
    """Encoder and masked-gene head of a checkpoint artifact, in evaluation mode."""
    record = artifacts.require(uri, KIND, SCHEMA)
    row = config.from_dict(config.Model, record.details["model"])
    model = MaskedModel(row, int(record.details["vocab_size"]))
    load_weights(model, read_tensors(storage.join(uri, WEIGHTS), record.files.get(WEIGHTS)), uri)
    return model.to(device).eval(), record


def load_encoder(uri: str, device: torch.device | str = "cpu") -> tuple[Encoder, Record]:
    """The encoder of a checkpoint artifact, in evaluation mode, and the artifact's record."""
    model, record = load_model(uri, device)
    return model.encoder, record


def require_vocabulary(record: Record, vocabulary: str, what: str, field: str = "inputs.checkpoint") -> None:
    """Refuse to use a checkpoint, named by a field of the config, on tokens of another vocabulary."""
    if record.details["vocabulary"] != vocabulary:
        msg = (
            f"{field}: made with vocabulary {record.details['vocabulary'][:12]}, but {what} has {vocabulary[:12]}; "
            f"name a checkpoint trained on that vocabulary, or prepare with --set vocab.reuse=URI"
        )
        raise UserError(msg)


def require_sentences(record: Record, corpus: Corpus, field: str = "inputs.checkpoint") -> None:
    """Refuse to read a corpus with a checkpoint, named by a field of the config, that was trained on other sentences.

    Other are another vocabulary, `<cls>` where it knows none, and another scaling by medians. Their length may differ.
    """
    require_vocabulary(record, corpus.vocabulary.hash, "the corpus", field)
    require_tokens(record, corpus, f"{field}:")


def require_tokens(record: Record, corpus: Corpus, subject: str) -> None:
    """The same, whatever the vocabulary; the line begins with `subject`."""
    theirs, ours = record.details["tokens"], config.to_dict(corpus.tokenised)
    for name in ("cls", "scaling"):
        if theirs[name] != ours[name]:
            know, here = json.dumps(theirs[name]), json.dumps(ours[name])
            msg = (f"{subject} trained on sentences with tokens.{name} = {know}, {corpus.uri} has {here}; "
                   f"prepare that with --set tokens.{name}={know}, or name another checkpoint")  # fmt: skip
            raise UserError(msg)


# Hugging Face BERT names

_LAYER = {
    "out": "attention.output.dense", "norm_attention": "attention.output.LayerNorm", "up": "intermediate.dense",
    "down": "output.dense", "norm_ffn": "output.LayerNorm",
}  # fmt: skip
_HEAD = {"dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm"}


def to_bert(model: MaskedModel) -> dict[str, Tensor]:
    """The state dict of an equal Hugging Face `BertForMaskedLM` (one token type, a zero vector)."""
    own = {k: v.detach() for k, v in model.named_parameters()}
    dim = model.encoder.row.dim
    out = {
        "bert.embeddings.word_embeddings.weight": own["encoder.tokens"],
        "bert.embeddings.position_embeddings.weight": own["encoder.positions"],
        "bert.embeddings.token_type_embeddings.weight": torch.zeros(1, dim, device=own["encoder.tokens"].device),
        "cls.predictions.bias": own["bias"],
        "cls.predictions.decoder.weight": own["encoder.tokens"],
        "cls.predictions.decoder.bias": own["bias"],
    }
    for kind in ("weight", "bias"):
        out[f"bert.embeddings.LayerNorm.{kind}"] = own[f"encoder.norm.{kind}"]
        for ours, theirs in _HEAD.items():
            out[f"{theirs}.{kind}"] = own[f"{ours}.{kind}"]
        for i in range(model.encoder.row.num_layers):
            layer = f"bert.encoder.layer.{i}"
            parts = own[f"encoder.layers.{i}.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                out[f"{layer}.attention.self.{name}.{kind}"] = part
            for ours, theirs in _LAYER.items():
                out[f"{layer}.{theirs}.{kind}"] = own[f"encoder.layers.{i}.{ours}.{kind}"]
    return out


def from_bert(state: Mapping[str, Tensor], row: config.Model) -> dict[str, Tensor]:
    """Our parameters from the state dict of a Hugging Face `BertForMaskedLM` (or `BertModel`, then without a head).

    The first token-type vector is added to every position. Names may carry the prefix `bert.` or not.
    """
    given = {k.removeprefix("bert."): v.float() for k, v in state.items()}
    try:
        out = {
            "encoder.tokens": given["embeddings.word_embeddings.weight"],
            "encoder.positions": given["embeddings.position_embeddings.weight"]
            + given["embeddings.token_type_embeddings.weight"][0],
        }
        for kind in ("weight", "bias"):
            out[f"encoder.norm.{kind}"] = given[f"embeddings.LayerNorm.{kind}"]
            for i in range(row.num_layers):
                layer = f"encoder.layer.{i}"
                parts = [given[f"{layer}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
                out[f"encoder.layers.{i}.qkv.{kind}"] = torch.cat(parts)
                for ours, theirs in _LAYER.items():
                    out[f"encoder.layers.{i}.{ours}.{kind}"] = given[f"{layer}.{theirs}.{kind}"]
            for ours, theirs in _HEAD.items():
                if f"{theirs}.{kind}" in given:
                    out[f"{ours}.{kind}"] = given[f"{theirs}.{kind}"]
    except KeyError as error:
        msg = f"weights without {error.args[0]!r}: need a BERT with at least {row.num_layers} layers"
        raise UserError(msg) from None
    if "cls.predictions.bias" in given:
        out["bias"] = given["cls.predictions.bias"]
    return out
