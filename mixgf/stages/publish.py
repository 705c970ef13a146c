"""`push` and `pull`: a trained encoder and its classifiers as a model with a name, which travels without its run.

| file | what it is |
|---|---|
| model.json | name, licence, recipe, what it saw, and every file with its size and SHA-256 |
| README.md | model card; its head is that of the Hugging Face Hub |
| pretrain/, corpus/vocabulary.parquet | encoder and vocabulary, as in a run |
| seen.parquet | the cells that it was trained on, as hashes of counts, for `mixgf audit` |
| classifiers/GROUP/ | classifiers, as `mixgf classify` keeps them |
| config.json, model.safetensors, token_dictionary.json | with `huggingface`: the encoder as `transformers` reads it |

A place is a folder or prefix of object storage that holds models by name, or an MLflow tracker with its registry of models.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from mixgf.classification import kept_classifier
from mixgf.corpus import overlap
from mixgf.encoder import checkpoint
from mixgf.errors import UserError
from mixgf.genes.vocabulary import Vocabulary
from mixgf.stages.export import write_bert
from mixgf.storage import artifacts, files, model_store
from mixgf.storage.artifacts import Record
from mixgf.tracking import model_card, model_registry

CARD, RECIPE, SEEN = "README.md", "recipe.json", overlap.SEEN
CLASSIFIERS = kept_classifier.FOLDER
MLFLOW = "mlflow"
"""The place of MLFLOW_TRACKING_URI."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """What is published of a run."""

    run: str
    """URI of a run (its encoder, vocabulary and classifiers), or of one kept classifier."""
    name: str
    licence: str
    """SPDX identifier, for example MIT or CC-BY-4.0."""
    half: bool = False
    """Store weights in half precision."""
    cells: int | None = None
    """Most training cells that each classifier carries, with their raw counts; None = as it was kept."""
    huggingface: bool = False
    """Add the encoder as `transformers` reads it."""
    note: str = ""
    """What the model is for and what not, for its card."""


def push(asked: Push, place: str = "") -> str:
    """Publish a model at a place; returns its URI. Empty place = the folder of this machine's models.

    Raises:
        UserError: the run has no encoder and no classifier, or the place holds another model of this name.
    """
    model_store.require_name(asked.name)
    where = _tracker(place)
    if where is None:
        return _write(asked, files.join(place or model_store.home(), asked.name))
    with tempfile.TemporaryDirectory(prefix="mixgf-push-") as folder:
        made = _write(asked, files.join(folder, asked.name))
        found = model_store.manifest(made)
        assert found is not None, "a model was written"
        kind = "classifier" if len(found["classifiers"]) == 1 or not found["encoder"] else "encoder"
        card = files.read_bytes(files.join(made, CARD)).decode()
        return model_registry.push(where, asked.name, made, kind=kind, card=card)


def pull(name: str, place: str, to: str = "") -> str:
    """Fetch a model from a place, with all checksums verified; returns its URI.

    Args:
        name: Of the model; `NAME@VERSION` in an MLflow registry, where the newest version is taken without one.
        place: Where it was pushed to.
        to: Folder of models that receives it; empty = that of this machine, where `load` finds it by name.

    Raises:
        UserError: there is no such model, or a file is not as it was pushed.
    """
    plain, _, version = name.partition("@")
    model_store.require_name(plain)
    target, where = files.join(to or model_store.home(), plain), _tracker(place)
    if where is None:
        model_store.copy(files.join(place, plain), target)
        return target
    with tempfile.TemporaryDirectory(prefix="mixgf-pull-") as folder:
        model_store.copy(model_registry.pull(where, plain, version, folder), target)
    return target


def _tracker(place: str) -> str | None:
    """The MLflow tracker that a place is; None = it is a folder or prefix.

    Raises:
        UserError: `mlflow` without MLFLOW_TRACKING_URI.
    """
    if place == MLFLOW:
        where = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not where:
            msg = f"place {MLFLOW}: set MLFLOW_TRACKING_URI, or name the tracker itself, for example http://host:5000"
            raise UserError(msg)
        return where
    return (
        place if place.startswith(("http://", "https://", "sqlite://", "postgresql", "mysql", "databricks")) else None
    )


# A model's folder


def _write(asked: Push, to: str) -> str:
    there = model_store.manifest(to)
    encoder, classifiers = _parts(asked.run)
    sources = {"encoder": encoder.fingerprint if encoder is not None else None}
    sources |= {name: artifacts.require(uri, kept_classifier.KIND).fingerprint for name, uri in classifiers.items()}
    choices = {
        "licence": asked.licence,
        "half": asked.half,
        "cells": asked.cells,
        "huggingface": asked.huggingface,
        "note": asked.note,
    }
    if there is not None:
        if there["made_of"] == sources and there["choices"] == choices:
            return to
        msg = f"{to}: holds another model of this name; remove it, or take another name"
        raise UserError(msg)
    names, cards = [], []
    recipe: dict[str, Any] = {}
    audit: dict[str, Any] = {}
    if encoder is not None:
        names += _write_encoder(asked, to, encoder)
        corpus = artifacts.require(files.join(asked.run, "corpus"), "corpus")
        recipe |= {
            "pretrain": _portable(encoder.config),
            "details": encoder.details,
            "corpus": _portable(corpus.config),
        }
        audit |= {
            "encoder_cells": corpus.counts.get("kept", 0), "sources": [one["name"] for one in corpus.config.get("sources", [])],
            "species": corpus.details.get("species", []), "corpus": corpus.fingerprint,
        }  # fmt: skip
        cards.append(model_card.encoder(encoder, corpus, {}))
    for group, uri in classifiers.items():
        names += _write_classifier(asked, uri, files.join(to, CLASSIFIERS, group), f"{CLASSIFIERS}/{group}")
        facts = kept_classifier.facts(uri)
        audit[f"classifier {group}"] = {
            name: facts["about"][name] for name in ("training_cells", "sources", "species", "label")
        }
        recipe[f"classifier {group}"] = facts["about"]
        cards.append(model_card.classifier(facts))
    files.write_json(files.join(to, RECIPE), recipe)
    files.write_bytes(files.join(to, CARD), _card(asked, cards).encode())
    names += [RECIPE, CARD]
    manifest = {
        "format": model_store.FORMAT, "name": asked.name, "licence": asked.licence, "code": artifacts.code_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "made_of": sources, "choices": choices, "audit": audit,
        "encoder": encoder is not None, "classifiers": sorted(classifiers), "files": artifacts.checksums_of(to, sorted(names)),
    }  # fmt: skip
    files.write_json(files.join(to, model_store.MANIFEST), manifest)
    return to


def _parts(run: str) -> tuple[Record | None, dict[str, str]]:
    """Record of a run's encoder, and its classifiers by name.

    Raises:
        UserError: there is neither.
    """
    itself = artifacts.find(run)
    if itself is not None and itself.kind == kept_classifier.KIND:
        return None, {run.rstrip("/").rpartition("/")[2]: run}
    encoder = artifacts.find(files.join(run, "pretrain"))
    folder = files.join(run, "classify", kept_classifier.FOLDER)
    found = {name: files.join(folder, name) for name in files.list_dir(folder)}
    tuned = files.join(run, "finetune")
    if artifacts.find(tuned) is not None:
        found["finetuned"] = tuned
    if encoder is None and not found:
        msg = f"--from {run}: no encoder (pretrain/) and no classifier there; name a run, or a classifier that `mixgf classify` kept"
        raise UserError(msg)
    return encoder, found


def _write_encoder(asked: Push, to: str, record: Record) -> list[str]:
    """The encoder as in a run, its vocabulary, what it saw, and with `huggingface` its other form; returns names of files."""
    corpus = files.join(asked.run, "corpus")
    model, made = checkpoint.load_model(files.join(asked.run, "pretrain"))
    words = Vocabulary.load(corpus)
    checkpoint.require_vocabulary(made, words.hash, f"{corpus}, which goes with it,")
    tensors = {name: p.detach().half() if asked.half else p.detach() for name, p in model.named_parameters()}
    weights = checkpoint.write_tensors(files.join(to, "pretrain", checkpoint.WEIGHTS), tensors)
    plain, trained = (
        replace(one, config=_portable(one.config), details=_portable(one.details))
        for one in (record, artifacts.require(corpus, "corpus"))
    )
    artifacts.finish(
        files.join(to, "pretrain"), plain, counts=record.counts, files={checkpoint.WEIGHTS: weights}, details=plain.details
    )  # fmt: skip
    words.save(files.join(to, "corpus", "vocabulary.parquet"))
    checksums = artifacts.checksums_of(files.join(to, "corpus"), ["vocabulary.parquet"])
    artifacts.finish(files.join(to, "corpus"), trained, counts=trained.counts, files=checksums, details=trained.details)
    names = [
        f"pretrain/{checkpoint.WEIGHTS}",
        "pretrain/record.json",
        "corpus/vocabulary.parquet",
        "corpus/record.json",
    ]
    known = record.parents.get("corpus") == trained.fingerprint  # else it was trained elsewhere
    if known:
        overlap.save_seen(overlap.training_cells(files.join(asked.run, "pretrain")), files.join(to, SEEN))
        names.append(SEEN)
    if asked.huggingface:
        names += write_bert(model, words, to)
    return names


def _portable(value: Any) -> Any:
    """Plain data in which paths and URIs of this machine are names of files."""
    if isinstance(value, dict):
        return {key: _portable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(one) for one in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or "://" in value):
        return value.rstrip("/").rpartition("/")[2]
    return value


def _write_classifier(asked: Push, uri: str, to: str, name: str) -> list[str]:
    """A classifier with fewer cells and in half precision, if that is asked for; returns names of its files."""
    kept, words, record = kept_classifier.load(uri)
    kept = kept_classifier.carrying(kept, asked.cells)
    kept_classifier.save(to, kept, words, half=asked.half)
    kept_classifier.finish(to, record)
    return [f"{name}/{one}" for one in files.list_dir(to)]


def _card(asked: Push, cards: Sequence[str]) -> str:
    """A model card with the head of the Hugging Face Hub."""
    head = f"---\nlicense: {asked.licence.lower()}\nlibrary_name: mixgf\ntags:\n- single-cell\n- biology\n---\n"
    use = (
        f"# {asked.name}\n{asked.note}\n\nLicence: {asked.licence}.\n\n## Use\n```bash\nmixgf pull {asked.name} --from PLACE\n"
        f"mixgf annotate my.h5ad --model {asked.name}\nmixgf audit human=my.h5ad {asked.name}\n```\n"
        f"```python\nimport mixgf as mg\nmg.load({asked.name!r}).embed(adata)\nmg.load_classifier({asked.name!r}).annotate(adata)\n```\n\n"
    )
    return head + use + "\n".join(cards)
