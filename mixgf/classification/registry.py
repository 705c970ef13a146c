"""What is scored: the names in `classify.models`, and the encoders that they may ask for.

A model is a baseline (`hvg_logreg`), or a head on the run's checkpoint (`probe`), or a head on another encoder
(`probe@mlm`). Other encoders are named in `classify.encoders` (`mlm=URI of a checkpoint`); `untrained` is always there: the
shape of the run's checkpoint with random weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from mixgf.classification import baselines, scvi
from mixgf.classification.splits import Split
from mixgf.config import classification, training
from mixgf.config.classification import Classify
from mixgf.config.fields import names
from mixgf.config.parse import from_dict
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import Encoder
from mixgf.errors import UserError
from mixgf.storage import artifacts
from mixgf.storage.artifacts import Record

HEADS = classification.HEADS
_WARM = {
    "layer": "all", "gene_weights": True, "warm_start": True, "align": True, "epochs": 2, "min_steps": 0, "warmup_steps": 20,
    "batch_cells": 16,
}  # fmt: skip
TUNINGS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "finetune_linear_start": _WARM | {"lr": 3e-4},
    "lora": _WARM | {"lr": 1e-3},
}
"""Models that train the encoder, and the fields of `config.Classify` that each sets: `finetune` none, so it is the paper's by
default.

The others begin at the convex optimum (`convex`), so two epochs suffice: where more genes than cells leave no training error,
the steps that follow change little, and where they raise the validation loss, the beginning predicts.
"""
LORA_RANK = 8
"""Of `lora`, where `classify.lora_rank` gives none."""
OWN = (*TUNINGS, *HEADS)
CHECKPOINT, UNTRAINED = "", "untrained"
"""Names of the run's own encoder and of the one with random weights."""
_OWN_NAME = "trained"
"""How the run's own encoder is called where it needs a name."""
_RESERVED = (UNTRAINED, _OWN_NAME, "expression")
"""Not for other encoders; `expression` is the space that encoders are measured against."""


def parse(model: str) -> tuple[str, str]:
    """Head and encoder of a model: `probe@mlm` is (probe, mlm), `probe` is (probe, "")."""
    head, _, encoder = model.partition("@")
    return head, encoder


def named(settings: Classify) -> dict[str, str]:
    """`classify.encoders` as name to URI.

    Raises:
        UserError: A name cannot be used, or has no URI.
    """
    for name, uri in settings.encoders.items():
        if not (uri and name.replace("_", "").isalnum()) or name in _RESERVED:
            msg = (f"classify.encoders: {name}={uri}: must be NAME=URI of a checkpoint, with a name of letters, digits and _ that "
                   f"is none of {', '.join(_RESERVED)}")  # fmt: skip
            raise UserError(msg)
    return dict(settings.encoders)


def require(settings: Classify) -> None:
    """Refuse what is not known in `classify.models` and `classify.seeds_per_model`."""
    for name in settings.models:
        _require_known(settings, "classify.models", name)
    for name in settings.seeds_per_model:
        _require_known(settings, "classify.seeds_per_model", name)


def _require_known(settings: Classify, where: str, name: str) -> None:
    encoders = (CHECKPOINT, UNTRAINED, *named(settings))
    head, encoder = parse(name)
    if name in baselines.BASELINES or (head in OWN and encoder in encoders):
        return
    if head in OWN:
        msg = f"{where}: {name!r}: no encoder {encoder!r}; there are {', '.join(encoders[1:])}; name it with classify.encoders={encoder}=URI"
        raise UserError(msg)
    msg = f"{where}: {name!r} is not known; there are {', '.join((*OWN, *baselines.BASELINES))}, and HEAD@ENCODER"
    raise UserError(msg)


def skipped(names: Iterable[str]) -> dict[str, str]:
    """Models that are asked for and cannot run here, with the reason: another project's package is not installed."""
    return {name: why for name in names if (why := scvi.missing(name))}


def called(encoder: str) -> str:
    """An encoder's name where it must have one, such as a folder's."""
    return encoder or _OWN_NAME


def curve(settings: Classify) -> tuple[str, ...]:
    """Models of the label-efficiency curve and of the left out types."""
    return settings.curve_models or tuple(m for m in settings.models if not is_tuned(m))


def scored(settings: Classify, split: Split) -> tuple[str, ...]:
    """The models that are scored on a split."""
    models = settings.models if split.whole else curve(settings)
    number = seeds(settings)
    return tuple(m for m in models if split.seed < number[m] and (not is_tuned(m) or len(split.validation)))


def seeds(settings: Classify) -> dict[str, int]:
    """How many seeds each model has."""
    fewer = settings.seeds_per_model
    return {model: min(settings.seeds, fewer.get(model, settings.seeds)) for model in settings.models}


def of_encoders(models: Iterable[str], heads: Iterable[str] = OWN) -> list[str]:
    """The encoders that models with one of these heads need, each once, in the order of their names."""
    pairs = [parse(m) for m in models]
    return sorted({encoder for head, encoder in pairs if head in tuple(heads)})


def is_tuned(model: str) -> bool:
    """Whether a model trains the encoder."""
    return parse(model)[0] in TUNINGS


def recipe(run: Config, model: str) -> Config:
    """The config that a model that trains the encoder works by."""
    return replace(run, classify=replace(run.classify, **_tuning(parse(model)[0], run.classify.lora_rank)))


def _tuning(head: str, lora_rank: int) -> dict[str, Any]:
    """Fields of `config.Classify` that a model that trains the encoder sets."""
    return TUNINGS[head] | ({"lora_rank": lora_rank or LORA_RANK, "freeze_layers": 0} if head == "lora" else {})


def records(checkpoint_uri: str, run: Config, corpus: Corpus) -> dict[str, Record]:
    """Records of the run's checkpoint ("") and of every named encoder that a model asks for.

    Raises:
        UserError: A checkpoint is not there, or was trained on other sentences than the corpus has.
    """
    uris = {CHECKPOINT: checkpoint_uri} | named(run.classify)
    wanted = {CHECKPOINT, *of_encoders(run.classify.models)} & set(uris)
    found: dict[str, Record] = {}
    for name in sorted(wanted):
        found[name] = artifacts.require(uris[name], checkpoint.KIND, checkpoint.SCHEMA)
        checkpoint.require_sentences(found[name], corpus, _field(name, uris[name]))
    return found


def _field(name: str, uri: str) -> str:
    return f"classify.encoders: {name}={uri}" if name else "inputs.checkpoint"


def load(checkpoint_uri: str, encoder: str, run: Config, corpus: Corpus, device: torch.device | str = "cpu") -> Encoder:
    """An encoder by name.

    Args:
        checkpoint_uri: The run's checkpoint.
        encoder: "", `untrained` or a name in `classify.encoders`.
        run: The whole config.
        corpus: The cells that it will read.
        device: Where its weights are.

    Raises:
        UserError: The checkpoint was trained on other sentences than the corpus has.
    """
    others = named(run.classify)
    uri = others.get(encoder, checkpoint_uri)
    made, record = checkpoint.load_encoder(uri, device)
    checkpoint.require_sentences(record, corpus, _field(encoder if encoder in others else "", uri))
    if encoder != UNTRAINED:
        return made
    shape = from_dict(training.Model, record.details["model"])
    return Encoder(shape, made.vocab_size, seed=run.seed + 1_000_003).to(device)


def reads(model: str, run: dict[str, Any]) -> dict[str, Any]:
    """The part of a config, as plain data, that decides what a model predicts on a given split.

    Beside it stand the split and, as parents, the corpus and the encoder.
    """
    head, _ = parse(model)
    settings = run["classify"]
    if model in baselines.BASELINES:
        return {name: settings[name] for name in names(Classify, role="heads")} | {
            "orthologs": run["vocab"]["orthologs"]
        }
    if head in HEADS:
        return {"knn": settings["knn"], "embed": run["embed"]}
    train = {name: run["train"][name] for name in ("schedule", "weight_decay", "clip", "precision")}
    tuning = settings | _tuning(head, settings["lora_rank"])
    rest = {name: tuning[name] for name in names(Classify, role="finetune")}
    return rest | {
        "embed": run["embed"],
        "train": train,
        "orthologs": run["vocab"]["orthologs"] if tuning["align"] else [],
    }
