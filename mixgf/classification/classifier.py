"""A trained classifier that is kept: encoder, one linear layer, and what is needed to say when not to trust it.

Fine-tuned encoders and logistic probes are the same thing here, an encoder and a linear layer; some have weights of genes beside
it. Temperature and limits are
fitted on validation cells (of the training part, with which no weight was trained), so a limit says of its own how many
ordinary cells it doubts: `DOUBTED` of them by the probability and as many by the distance.

Shapes: N cells, D width of the encoder's vector, C classes, V vocabulary. A cell's vector has D numbers, or, where genes have
weights, D + C: the weights of its genes, summed by class, stand behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy import optimize, special

from mixgf.arrays import Floats, Integers
from mixgf.classification import baselines, linear_start, metrics, registry
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import Split
from mixgf.config import parse, training
from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.corpus import packed
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint, embed
from mixgf.encoder.bert import Encoder
from mixgf.errors import UserError
from mixgf.genes.vocabulary import NUM_SPECIALS, Vocabulary
from mixgf.rng import hashed
from mixgf.storage import artifacts, files

KIND, SCHEMA = "classifier", 3
FOLDER = "classifiers"
"""Beside the tables of a classification, one classifier per group of cells."""
DOUBTED = 0.025
"""Share of the validation cells that lie beyond each limit."""
FEW_GENES = 0.01
"""Cells with fewer detected genes than this share of the training cells are doubted."""
UNSURE, FAR, SHALLOW, EMPTY = "unsure", "unlike its type", "few genes", "no known gene"
"""Why a label is doubted: probability, distance, depth; a cell without any gene of the vocabulary gets none."""
_WEIGHTS, _FACTS, _VOCABULARY = "model.safetensors", "classifier.json", "vocabulary.parquet"


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What `mixgf annotate` needs and nothing else."""

    encoder: Encoder
    head_CD: Floats
    bias_C: Floats
    classes: tuple[str, ...]
    pooling: str
    layer: LayerChoice
    """Hidden layer that is pooled, counted from the last, -1; `all` = all side by side."""
    genes_CV: Floats
    """Weights of tokens, for `convex.gene_rows`; no columns where there are none."""
    temperature: float = 1.0
    """Logits are divided by it (Guo et al. 2017)."""
    centres_CD: Floats
    """Mean direction of each class's training cells."""
    spread_C: Floats
    """Mean cosine distance of a class's training cells to it."""
    least_probability: float = 0.0
    greatest_distance: float = float("inf")
    """In units of the class's `spread_C`."""
    least_genes: int = 0
    share_V: Floats
    """How often each token occurs in the training sentences, as a share of all tokens."""
    about: dict[str, Any] = field(default_factory=dict)
    """Plain facts: model, group, split, species and tokens of training, species rows, scores on the test cells."""

    def vectors(self, sentences: embed.SentenceSource, cells: Integers) -> Floats:
        """Vectors of some cells, as the other methods want them."""
        made = embed.embed_cells(
            self.encoder, sentences, cells, self.pooling, self.layer, max_len=int(self.about["max_len"])
        )
        return with_votes(made, self.genes_CV, sentences, cells, int(self.about["max_len"]))

    def logits(self, vectors_ND: Floats) -> Floats:
        """Class scores (N, C) of vectors, before the temperature."""
        D = self.head_CD.shape[1]
        out_NC = vectors_ND[:, :D].astype(np.float64) @ self.head_CD.T.astype(np.float64) + self.bias_C
        return out_NC + vectors_ND[:, D:] if self.genes_CV.shape[1] else out_NC

    def probabilities(self, vectors_ND: Floats) -> Floats:
        """Calibrated class probabilities (N, C)."""
        return special.softmax(self.logits(vectors_ND) / self.temperature, axis=1)

    def distances(self, vectors_ND: Floats, predicted_N: Integers) -> Floats:
        """Cosine distance to the predicted class's centre, over the usual distance of that class's training cells."""
        unit_ND = baselines.unit(vectors_ND[:, : self.head_CD.shape[1]].astype(np.float64))
        away_N = 1 - (unit_ND * self.centres_CD[predicted_N]).sum(1)
        return away_N / np.maximum(self.spread_C[predicted_N], 1e-9)

    def doubts(self, probabilities_NC: Floats, distance_N: Floats, genes_N: Integers) -> list[str]:
        """Why each cell's label is not to be trusted, joined by `; `; empty = no reason found."""
        tests = (
            (UNSURE, probabilities_NC.max(1) < self.least_probability),
            (FAR, distance_N > self.greatest_distance),
            (SHALLOW, genes_N < self.least_genes),
        )
        return ["; ".join(name for name, hit_N in tests if hit_N[i]) for i in range(len(genes_N))]


def with_votes(
    vectors_ND: Floats, genes_CV: Floats, sentences: embed.SentenceSource, cells: Integers, max_len: int
) -> Floats:
    """The encoder's vectors (N, D), and behind them the summed weights of the cells' genes (N, C), where genes have any."""
    if not genes_CV.shape[1]:
        return vectors_ND
    few = packed.truncate(*sentences.tokens(cells), max_len)
    return np.hstack([vectors_ND, linear_start.gene_rows(*few, genes_CV.shape[1]) @ genes_CV.T])


def keep(
    encoder: Encoder, head_CD: Floats, bias_C: Floats, genes_CV: Floats, *, classes: tuple[str, ...], pooling: str, layer: LayerChoice, train_ND: Floats,
    labels_N: Integers, genes_N: Integers, tokens_T: Integers, vocab_size: int, validation_ND: Floats, validation_labels: Integers,
    about: dict[str, Any],
) -> Kept:  # fmt: skip
    """A classifier with its limits.

    Args:
        encoder: Of the vectors.
        head_CD: Weights of the linear layer.
        bias_C: Its bias.
        genes_CV: Weights of tokens, or no columns.
        classes: Names, in the order of the rows of `head_CD`.
        pooling: How vectors are pooled.
        layer: Of which hidden layer.
        train_ND: Vectors of the training cells, without the validation cells.
        labels_N: Their class ids, each class at least once.
        genes_N: Their numbers of detected genes.
        tokens_T: Their sentences, one after the other.
        vocab_size: V.
        validation_ND: Vectors of the validation cells.
        validation_labels: Their class ids.
        about: What else is kept.
    """
    head_CD, bias_C, genes_CV = (x.astype(np.float32) for x in (head_CD, bias_C, genes_CV))  # as they are stored
    unit_ND = baselines.unit(train_ND[:, : head_CD.shape[1]].astype(np.float64))
    centres_CD = baselines.unit(np.stack([unit_ND[labels_N == c].mean(0) for c in range(len(classes))]))
    away_N = 1 - (unit_ND * centres_CD[labels_N]).sum(1)
    usual = max(float(away_N.mean()), 1e-9)
    # a class of a single cell has no spread: it takes the mean of all
    spread_C = np.array(
        [away_N[labels_N == c].mean() if (labels_N == c).sum() > 1 else usual for c in range(len(classes))]
    )
    genes = tokens_T[tokens_T >= NUM_SPECIALS]
    share_V = np.bincount(genes, minlength=vocab_size) / max(len(genes), 1)
    made = Kept(
        encoder=encoder, head_CD=head_CD, bias_C=bias_C, genes_CV=genes_CV, classes=classes, pooling=pooling, layer=layer,
        centres_CD=centres_CD, spread_C=spread_C, share_V=share_V, least_genes=int(np.quantile(genes_N, FEW_GENES)), about=about,
    )  # fmt: skip
    made = replace(made, temperature=fit_temperature(made.logits(validation_ND), validation_labels))
    p_NC = made.probabilities(validation_ND)
    distance_N = made.distances(validation_ND, p_NC.argmax(1))
    loss = float(-np.log(p_NC[np.arange(len(p_NC)), validation_labels].clip(1e-12)).mean())
    return replace(
        made, least_probability=float(np.quantile(p_NC.max(1), DOUBTED)),
        greatest_distance=float(np.quantile(distance_N, 1 - DOUBTED)),
        about=about | {"validation": {"cells": len(p_NC), "loss": loss, "accuracy": float((p_NC.argmax(1) == validation_labels).mean())}},
    )  # fmt: skip


def fit_temperature(logits_NC: Floats, labels_N: Integers) -> float:
    """The divisor of the logits with the lowest log loss (Guo et al. 2017), between 1/2 and 20.

    A few validation cells that are all right would ask for a divisor of 0, that is, for certainty: hence 1/2.
    """

    def loss(log_t: float) -> float:
        scaled = logits_NC / np.exp(log_t)
        return float((special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels_N)), labels_N]).mean())

    bounds = (float(np.log(0.5)), float(np.log(20)))
    return float(np.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


def wanted(run: Config, split: Split) -> bool:
    """Whether the classifiers trained on this split are candidates to be kept: seed 0 of the first split within a group."""
    kinds = [kind for kind in run.classify.splits if kind in ("random", "donor")]
    return run.classify.keep and split.seed == 0 and kinds[:1] == [split.kind]


def of_split(
    encoder: Encoder, head: tuple[Floats, Floats, Floats] | None, vectors: Callable[[Integers], Floats], *, model: str, corpus: Corpus,
    table: Labelled, split: Split, run: Config, max_len: int, layer: LayerChoice,
) -> Kept:  # fmt: skip
    """What is kept of a model trained on one split, with its own scores on the split's test cells.

    Args:
        encoder: Trained.
        head: Weights (C, D) and bias (C,) of its linear layer, and weights of tokens (C, V), or no columns; None = a logistic
            probe is fitted here, on the training cells without the validation cells.
        vectors: Pooled vectors (N, D) of cells of the corpus, by this encoder, without votes of genes.
        model: Its name.
        corpus: The sentences.
        table: The labelled cells.
        split: Which of them train, validate and are tested.
        run: The whole config.
        max_len: Longest sentence that is read.
        layer: Hidden layer that is pooled.
    """
    trained = np.setdiff1d(split.train, split.validation)
    rows = np.concatenate([trained, split.validation, split.test])
    cuts = np.cumsum([len(trained), len(split.validation)])
    vectors_ND = vectors(table.cells[rows])
    if head is not None:
        vectors_ND = with_votes(vectors_ND, head[2].astype(np.float32), corpus, table.cells[rows], max_len)
    train_ND, validation_ND, test_ND = np.split(vectors_ND, cuts)
    genes_N = corpus.obs(["n_genes"])["n_genes"].to_numpy() if "n_genes" in corpus.columns else corpus.lengths_N
    labels = [split.ids(table.labels[part]) for part in (trained, split.validation, split.test)]
    cells = table.cells[trained]
    if head is None:
        head = (*probe(train_ND, labels[0], len(split.classes)), np.zeros((len(split.classes), 0)))
    about = {
        "model": model, "group": split.group, "split": split.kind, "seed": split.seed, "max_len": max_len,
        "tokens": parse.to_dict(corpus.token_settings), "species": sorted(set(table.species[trained].tolist())),
        "species_rows": corpus.record.config.get("species", []), "label": run.classify.label, "training_cells": len(trained),
        "sources": sorted(set(table.sources[trained].tolist())),
    }  # fmt: skip
    kept = keep(
        encoder, *head, classes=split.classes, pooling=run.embed.pooling, layer=layer, train_ND=train_ND, labels_N=labels[0],
        genes_N=genes_N[cells], tokens_T=corpus.tokens(cells)[0], vocab_size=encoder.vocab_size, validation_ND=validation_ND,
        validation_labels=labels[1], about=about,
    )  # fmt: skip
    p_NC = kept.probabilities(test_ND)
    predicted = p_NC.argmax(1)
    doubted = np.array(
        [text != "" for text in kept.doubts(p_NC, kept.distances(test_ND, predicted), genes_N[table.cells[split.test]])]
    )
    rng = np.random.default_rng(int(hashed(run.seed, 13)))
    found, _ = metrics.score(labels[2], predicted, p_NC.max(1), table.donors[split.test], len(split.classes), rng=rng)
    right = predicted == labels[2]
    test = {name: one.value for name, one in found.items()} | {
        "cells": len(predicted),
        "doubted": float(doubted.mean()),
    }
    if not doubted.all():
        test["accuracy_trusted"] = float(right[~doubted].mean())
    if doubted.any():
        test["accuracy_doubted"] = float(right[doubted].mean())
    return replace(kept, about=kept.about | {"test": test})


def probe(train_ND: Floats, labels_N: Integers, num_classes: int) -> tuple[Floats, Floats]:
    """A logistic probe on z-scored vectors as a linear layer on the vectors themselves: weights (C, D) and bias (C,)."""
    mean, sd = train_ND.mean(0), train_ND.std(0)
    scale = np.divide(1, sd, out=np.zeros_like(sd), where=sd > 1e-8)
    weights_CD, bias_C = baselines.logistic_layer((train_ND - mean) * scale, labels_N, num_classes)
    weights_CD = weights_CD * scale
    return weights_CD, bias_C - weights_CD @ mean


# Storage

_ARRAYS = ("head_CD", "bias_C", "genes_CV", "centres_CD", "spread_C", "share_V")
_NUMBERS = ("pooling", "layer", "temperature", "least_probability", "greatest_distance", "least_genes")


def save(uri: str, kept: Kept, vocabulary: Vocabulary) -> None:
    """Write a classifier's files, as a part: `publish` makes it an artifact."""
    weights: dict[str, torch.Tensor] = {f"encoder.{name}": p for name, p in kept.encoder.named_parameters()}
    weights |= {name: torch.from_numpy(np.asarray(getattr(kept, name), dtype=np.float32)) for name in _ARRAYS}
    checkpoint.write_tensors(files.join(uri, _WEIGHTS), weights)
    vocabulary.save(files.join(uri, _VOCABULARY))
    facts = {name: getattr(kept, name) for name in _NUMBERS} | {
        "classes": list(kept.classes), "encoder": parse.to_dict(kept.encoder.sizes), "vocabulary": vocabulary.hash, "about": kept.about,
    }  # fmt: skip
    files.write_json(files.join(uri, _FACTS), facts)


def publish(uri: str, part: str, parents: dict[str, str]) -> None:
    """Make a kept part an artifact of its own at `uri`."""
    facts = files.read_json(files.join(part, _FACTS))
    record = artifacts.plan(
        KIND, SCHEMA, {name: facts["about"][name] for name in ("model", "group", "split", "seed")}, parents
    )
    if not artifacts.begin(uri, record):
        return
    names = (_WEIGHTS, _VOCABULARY, _FACTS)
    for name in names:
        files.copy(files.join(part, name), files.join(uri, name))
    artifacts.finish(uri, record, counts={"classes": len(facts["classes"])}, files=artifacts.summed(uri, names), details={"vocabulary": facts["vocabulary"], "classes": facts["classes"]} | facts["about"])  # fmt: skip


def facts(uri: str) -> dict[str, Any]:
    """What is known of a kept part without reading its weights."""
    return dict(files.read_json(files.join(uri, _FACTS)))


TRAINED = (*registry.TUNINGS, "probe")
"""Models of which a classifier can be kept."""


def find(uri: str) -> str:
    """The classifier that a user means: its own folder, or that of a classification (or run) with a single one.

    Raises:
        UserError: there is none, or more than one.
    """
    for place in (uri, files.join(uri, "classify")):
        record = artifacts.find(place)
        if record is None:
            continue
        if record.kind == KIND:
            return place
        folder = files.join(place, FOLDER)
        names = files.list_dir(folder) if record.kind == "classification" else []
        if len(names) == 1:
            return files.join(folder, names[0].rstrip("/"))
        if names:
            listed = ", ".join(files.join(folder, n.rstrip("/")) for n in names[:8])
            msg = f"--model {uri}: {len(names)} classifiers there, one per group of cells; name one of {listed}"
            raise UserError(msg)
        if record.kind == "classification":
            msg = f"--model {uri}: this classification kept no classifier; it needs {' or '.join(TRAINED)} among classify.models and classify.keep = true; make it again in another output"
            raise UserError(msg)
    msg = f"--model {uri}: no classifier there; `mixgf classify` makes them under OUTPUT/classify/{FOLDER}/"
    raise UserError(msg)


def load(uri: str, device: torch.device | str = "cpu") -> tuple[Kept, Vocabulary, artifacts.Record]:
    """A published classifier, its vocabulary and its record."""
    record = artifacts.require(uri, KIND, SCHEMA)
    found = facts(uri)
    tensors = checkpoint.read_tensors(files.join(uri, _WEIGHTS), record.files.get(_WEIGHTS))
    vocabulary = Vocabulary.load(files.join(uri, _VOCABULARY))
    if vocabulary.hash != found["vocabulary"]:
        msg = f"{uri}: its {_VOCABULARY} is not the one it was trained with; restore it"
        raise UserError(msg)
    encoder = Encoder(parse.from_dict(training.Model, found["encoder"]), vocabulary.size)
    checkpoint.load_weights(
        encoder, {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}, uri
    )
    numbers: dict[str, Any] = {name: found[name] for name in _NUMBERS} | {
        name: tensors[name].numpy() for name in _ARRAYS
    }
    kept = Kept(encoder=encoder.to(device).eval(), classes=tuple(found["classes"]), about=found["about"], **numbers)
    return kept, vocabulary, record
