"""Weights of a trained model on storage: safetensors for tensors, JSON for the rest, no pickle.

The artifact `checkpoint` holds the weights, sizes, hash of the vocabulary and settings of the sentences. Training state
to resume from is in `training.checkpoints`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from mixgf.config import parse, training
from mixgf.config.data import Tokens
from mixgf.config.fields import content_of
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import Encoder, MaskedModel
from mixgf.errors import UserError
from mixgf.storage import artifacts, files
from mixgf.storage.artifacts import Record

KIND, SCHEMA = "checkpoint", 1
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"
START = "start.safetensors"
"""Token vectors before training, where they are not random."""


def write_tensors(uri: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors as one safetensors file; returns its size in bytes and its SHA-256."""
    data = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    files.write_bytes(uri, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_tensors(uri: str, expected: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; if `expected` is given, its SHA-256 is checked. A damaged file is a `UserError`."""
    try:
        data = files.read_bytes(uri)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected["sha256"]:
            msg = f"{uri}: not the bytes that were written"
            raise UserError(restore_hint(msg, uri))
        return load_tensors(data)
    except (FileNotFoundError, safetensors.SafetensorError) as error:
        raise UserError(restore_hint(f"{uri}: {error}", uri)) from None


def restore_hint(what: str, uri: str) -> str:
    """Message for a damaged file of a checkpoint: of a step, or of the published weights, which the steps can give again."""
    folder = uri.rsplit("/", 1)[0]
    if folder.rsplit("/", 1)[-1].isdigit():
        return f"{what}. Restore it, or remove the folder {folder} to go on from what lies before it"
    return (
        f"{what}. Restore it, or remove it and {files.join(folder, 'record.json')}: the command that made it takes it again from "
        "the checkpoints under steps, which stay"
    )


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a model's parameters; other names or shapes are a `UserError`. `where` names the source."""
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


def publish_checkpoint(
    uri: str,
    record: Record,
    model: MaskedModel,
    *,
    vocabulary: str,
    tokens: Tokens,
    objective: training.Objective | None = None,
    counts: dict[str, Any] | None = None,
    checksums: dict[str, Any] | None = None,
    untrained: np.ndarray | None = None,
    held_out: dict[str, Any] | None = None,
    start_VD: Tensor | None = None,
) -> Record:
    """Write a model's weights and finish its artifact.

    Args:
        uri: the artifact's folder, already begun.
        record: the artifact's planned record.
        model: encoder and head.
        vocabulary: hash of the vocabulary.
        tokens: settings of the sentences.
        objective: of the training; None = the weights were imported.
        counts: counts of the record.
        checksums: bytes and SHA-256 of further files that were written.
        untrained: ids, ascending, without training data (see `untrained_ids`).
        held_out: how many cells of the corpus were not trained on, and in which units; None = there were none.
        start_VD: token vectors before training, which an untrained encoder has, too; None = random ones.
    """
    checksums = (checksums or {}) | {WEIGHTS: write_tensors(files.join(uri, WEIGHTS), model.published())}
    if start_VD is not None:
        checksums[START] = write_tensors(files.join(uri, START), {"tokens": start_VD})
    details = {
        "vocabulary": vocabulary,
        "vocab_size": model.encoder.vocab_size,
        "model": content_of(model.encoder.sizes),
        "tokens": parse.to_dict(tokens),
        "objective": content_of(objective) if objective is not None else None,
    }
    if held_out is not None:
        details["held_out"] = held_out
    if untrained is not None and len(untrained):
        runs = np.split(untrained, np.flatnonzero(np.diff(untrained) > 1) + 1)
        details["untrained"] = [[int(run[0]), int(run[-1]) + 1] for run in runs]
    return artifacts.finish(uri, record, counts=counts, files=checksums, details=details)


def untrained_ids(record: Record) -> np.ndarray:
    """Ids of a checkpoint's vocabulary whose embeddings were initialised but never trained, ascending."""
    runs = [np.arange(start, stop) for start, stop in record.details.get("untrained", ())]
    return np.concatenate([np.empty(0, dtype=np.int64), *runs])


def load_model(uri: str, device: torch.device | str = "cpu") -> tuple[MaskedModel, Record]:
    """Encoder and masked-gene head of a checkpoint artifact, in evaluation mode."""
    record = artifacts.require(uri, KIND, SCHEMA)
    sizes = parse.from_dict(training.Model, record.details["model"])
    model = MaskedModel(sizes, int(record.details["vocab_size"]))
    load_weights(model, read_tensors(files.join(uri, WEIGHTS), record.files.get(WEIGHTS)), uri)
    return model.to(device).eval(), record


def load_encoder(uri: str, device: torch.device | str = "cpu") -> tuple[Encoder, Record]:
    """Encoder of a checkpoint artifact, in evaluation mode, and the artifact's record."""
    model, record = load_model(uri, device)
    return model.encoder, record


def load_start(uri: str, *, seed: int | None = None, device: torch.device | str = "cpu") -> tuple[Encoder, Record]:
    """The encoder of a checkpoint artifact as it was before training, in evaluation mode, and the artifact's record.

    Token vectors are those of `model.start`; other weights are random. Where the checkpoint began with other weights
    (`inputs.start`, `import-weights`), all are random weights of the same law.

    Args:
        uri: of the artifact.
        seed: of the random weights; None = that of the training.
        device: where the weights are.
    """
    record = artifacts.require(uri, KIND, SCHEMA)
    seed = int(record.config.get("seed", 0)) if seed is None else seed
    sizes = parse.from_dict(training.Model, record.details["model"])
    encoder = Encoder(sizes, int(record.details["vocab_size"]), seed=seed)
    if START in record.files:
        with torch.no_grad():
            encoder.tokens.copy_(read_tensors(files.join(uri, START), record.files[START])["tokens"])
    return encoder.to(device).eval(), record


def require_vocabulary(record: Record, vocabulary: str, what: str, field: str = "inputs.checkpoint") -> None:
    """Raise a `UserError` if a checkpoint has another vocabulary; `what` and `field` name both sides in the message."""
    if record.details["vocabulary"] != vocabulary:
        msg = (
            f"{field}: made with vocabulary {record.details['vocabulary'][:12]}, but {what} has {vocabulary[:12]}; "
            f"name a checkpoint trained on that vocabulary, or prepare with --set vocab.reuse=URI"
        )
        raise UserError(msg)


def require_sentences(record: Record, corpus: Corpus, field: str = "inputs.checkpoint") -> None:
    """Raise a `UserError` if a checkpoint was trained on sentences of another kind than those of a corpus.

    The vocabulary, the use of `<cls>` and the scaling by medians must be the same; the length of sentences may differ.
    """
    require_vocabulary(record, corpus.vocabulary.hash, "the corpus", field)
    require_tokens(record, corpus, f"{field}:")


def require_tokens(record: Record, corpus: Corpus, subject: str) -> None:
    """`require_sentences` without the vocabulary; the message begins with `subject`."""
    theirs, ours = record.details["tokens"], parse.to_dict(corpus.token_settings)
    for name in ("cls", "scaling"):
        if theirs[name] != ours[name]:
            know, here = json.dumps(theirs[name]), json.dumps(ours[name])
            msg = (f"{subject} trained on sentences with tokens.{name} = {know}, {corpus.uri} has {here}; "
                   f"prepare that with --set tokens.{name}={know}, or name another checkpoint")  # fmt: skip
            raise UserError(msg)
