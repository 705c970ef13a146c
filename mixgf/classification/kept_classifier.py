"""Kept classifiers: an encoder, one linear layer, and limits beyond which a label is doubted.

A fine-tuned encoder and a logistic probe are both an encoder and a linear layer; some also have weights of genes. Temperature and
limits are fitted on validation cells, on which no weight was trained. Each limit doubts a known share of those cells: `DOUBTED` by
the probability and as many by the distance.

Shapes: N cells, D width of the encoder's vector, C classes, V vocabulary. A cell's vector has D numbers. Where genes have weights it
has D + C: the weights of its genes, summed by class, follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy import optimize, special

from mixgf.arrays import Floats, Integers
from mixgf.classification import linear_start, metrics, registry
from mixgf.classification.labels import Labelled
from mixgf.classification.models.protocol import LinearClassifier
from mixgf.classification.simple_classifiers import unit
from mixgf.classification.splits import Split
from mixgf.classification.workspace import Workspace
from mixgf.config import parse, training
from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.corpus import packed
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
"""Reasons to doubt a label: its probability, its distance, too few genes. A cell without any gene of the vocabulary has no label."""
_WEIGHTS, _FACTS, _VOCABULARY = "model.safetensors", "classifier.json", "vocabulary.parquet"
_FILES = (_WEIGHTS, _VOCABULARY, _FACTS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """A classifier as it is stored and as `mixgf annotate` uses it."""

    encoder: Encoder
    head_CD: Floats
    bias_C: Floats
    classes: tuple[str, ...]
    pooling: str
    layer: LayerChoice
    """Hidden layer that is pooled, counted from the last, -1; `all` = all side by side."""
    genes_CV: Floats
    """Weights of tokens, for `linear_start.gene_rows`; no columns where there are none."""
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
        unit_ND = unit(vectors_ND[:, : self.head_CD.shape[1]].astype(np.float64))
        away_N = 1 - (unit_ND * self.centres_CD[predicted_N]).sum(1)
        return away_N / np.maximum(self.spread_C[predicted_N], 1e-9)

    def doubts(self, probabilities_NC: Floats, distance_N: Floats, genes_N: Integers) -> list[str]:
        """Reasons to doubt each cell's label, joined by `; `; empty = none."""
        tests = (
            (UNSURE, probabilities_NC.max(1) < self.least_probability),
            (FAR, distance_N > self.greatest_distance),
            (SHALLOW, genes_N < self.least_genes),
        )
        return ["; ".join(name for name, hit_N in tests if hit_N[i]) for i in range(len(genes_N))]


def with_votes(
    vectors_ND: Floats, genes_CV: Floats, sentences: embed.SentenceSource, cells: Integers, max_len: int
) -> Floats:
    """The encoder's vectors (N, D); where genes have weights, their sums by class (N, C) are appended."""
    if not genes_CV.shape[1]:
        return vectors_ND
    few = packed.truncate(*sentences.tokens(cells), max_len)
    return np.hstack([vectors_ND, linear_start.gene_rows(*few, genes_CV.shape[1]) @ genes_CV.T])


def keep(
    linear: LinearClassifier, *, classes: tuple[str, ...], pooling: str, train_ND: Floats, labels_N: Integers, genes_N: Integers,
    tokens_T: Integers, vocab_size: int, validation_ND: Floats, validation_labels: Integers, about: dict[str, Any],
) -> Kept:  # fmt: skip
    """A classifier with its temperature and limits.

    Args:
        linear: The encoder and the linear layer.
        classes: Names, in the order of the rows of `linear.head_CD`.
        pooling: How vectors are pooled.
        train_ND: Vectors of the training cells, without the validation cells.
        labels_N: Their class ids, each class at least once.
        genes_N: Their numbers of detected genes.
        tokens_T: Their sentences, one after the other.
        vocab_size: V.
        validation_ND: Vectors of the validation cells.
        validation_labels: Their class ids.
        about: Further facts to store.
    """
    stored = (linear.head_CD, linear.bias_C, linear.genes_CV)
    head_CD, bias_C, genes_CV = (x.astype(np.float32) for x in stored)  # as they are stored
    centres_CD, spread_C = _centres(train_ND[:, : head_CD.shape[1]].astype(np.float64), labels_N, len(classes))
    genes = tokens_T[tokens_T >= NUM_SPECIALS]
    share_V = np.bincount(genes, minlength=vocab_size) / max(len(genes), 1)
    made = Kept(
        encoder=linear.encoder, head_CD=head_CD, bias_C=bias_C, genes_CV=genes_CV, classes=classes, pooling=pooling,
        layer=linear.layer, centres_CD=centres_CD, spread_C=spread_C, share_V=share_V,
        least_genes=int(np.quantile(genes_N, FEW_GENES)), about=about,
    )  # fmt: skip
    made = replace(made, temperature=fit_temperature(made.logits(validation_ND), validation_labels))
    p_NC = made.probabilities(validation_ND)
    distance_N = made.distances(validation_ND, p_NC.argmax(1))
    loss = float(-np.log(p_NC[np.arange(len(p_NC)), validation_labels].clip(1e-12)).mean())
    accuracy = float((p_NC.argmax(1) == validation_labels).mean())
    return replace(
        made, least_probability=float(np.quantile(p_NC.max(1), DOUBTED)),
        greatest_distance=float(np.quantile(distance_N, 1 - DOUBTED)),
        about=about | {"validation": {"cells": len(p_NC), "loss": loss, "accuracy": accuracy}},
    )  # fmt: skip


def _centres(vectors_ND: Floats, labels_N: Integers, num_classes: int) -> tuple[Floats, Floats]:
    """Mean direction (C, D) of each class's training cells, and their mean cosine distance to it (C,)."""
    unit_ND = unit(vectors_ND)
    centres_CD = unit(np.stack([unit_ND[labels_N == c].mean(0) for c in range(num_classes)]))
    away_N = 1 - (unit_ND * centres_CD[labels_N]).sum(1)
    usual = max(float(away_N.mean()), 1e-9)
    # a class of a single cell has no spread: it takes the mean of all
    members = [labels_N == c for c in range(num_classes)]
    return centres_CD, np.array([away_N[mine].mean() if mine.sum() > 1 else usual for mine in members])


def fit_temperature(logits_NC: Floats, labels_N: Integers) -> float:
    """The divisor of the logits with the lowest log loss (Guo et al. 2017), between 1/2 and 20.

    The lower bound keeps a few validation cells that are all predicted correctly from making every probability 0 or 1.
    """

    def loss(log_t: float) -> float:
        scaled = logits_NC / np.exp(log_t)
        return float((special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels_N)), labels_N]).mean())

    bounds = (float(np.log(0.5)), float(np.log(20)))
    return float(np.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


def wanted(run: Config, split: Split) -> bool:
    """Whether classifiers trained on this split may be kept: seed 0 of the first kind of split within a group, all labels and types."""
    kinds = [kind for kind in run.classify.splits if kind in ("random", "donor")]
    return run.classify.keep and split.whole and split.seed == 0 and kinds[:1] == [split.kind]


def of_split(workspace: Workspace, split: Split, model: str, linear: LinearClassifier) -> Kept:
    """The classifier to keep of a model that was trained on one split, with its own scores on the split's test cells.

    Args:
        workspace: Of the classification.
        split: Which cells train, validate and are tested.
        model: The model's name.
        linear: The trained encoder and linear layer.
    """
    run, corpus, table = workspace.config, workspace.corpus, workspace.table
    learned = np.setdiff1d(split.train, split.validation)
    rows = np.concatenate([learned, split.validation, split.test])
    cuts = np.cumsum([len(learned), len(split.validation)])
    genes_CV = linear.genes_CV.astype(np.float32)
    vectors_ND = with_votes(linear.vectors_ND, genes_CV, corpus, table.cells[rows], linear.max_len)
    train_ND, validation_ND, test_ND = np.split(vectors_ND, cuts)
    genes_N = corpus.obs(["n_genes"])["n_genes"].to_numpy() if "n_genes" in corpus.columns else corpus.lengths_N
    about = {
        "model": model, "group": split.group, "split": split.kind, "seed": split.seed, "max_len": linear.max_len,
        "tokens": parse.to_dict(corpus.token_settings), "species": sorted(set(table.species[learned].tolist())),
        "species_rows": corpus.record.config.get("species", []), "label": run.classify.label, "training_cells": len(learned),
        "sources": sorted(set(table.sources[learned].tolist())),
    }  # fmt: skip
    kept = keep(
        linear, classes=split.classes, pooling=run.embed.pooling, train_ND=train_ND, labels_N=split.ids(table.labels[learned]),
        genes_N=genes_N[table.cells[learned]], tokens_T=corpus.tokens(table.cells[learned])[0], vocab_size=linear.encoder.vocab_size,
        validation_ND=validation_ND, validation_labels=split.ids(table.labels[split.validation]), about=about,
    )  # fmt: skip
    test = _test_scores(
        kept, test_ND, genes_N[table.cells[split.test]], table.only(split.test), split=split, seed=run.seed
    )
    return replace(kept, about=kept.about | {"test": test})


def _test_scores(
    kept: Kept, vectors_MD: Floats, genes_M: Integers, cells: Labelled, *, split: Split, seed: int
) -> dict[str, float]:
    """Scores on the test cells: all metrics, the share of doubted cells, and accuracy with and without them."""
    true_M, p_MC = split.ids(cells.labels), kept.probabilities(vectors_MD)
    predicted_M = p_MC.argmax(1)
    doubts = kept.doubts(p_MC, kept.distances(vectors_MD, predicted_M), genes_M)
    doubted_M, right_M = np.array([text != "" for text in doubts]), predicted_M == true_M
    rng = np.random.default_rng(int(hashed(seed, 13)))
    found, _ = metrics.score(true_M, predicted_M, p_MC.max(1), cells.donors, len(split.classes), rng=rng)
    test = {name: one.value for name, one in found.items()}
    test |= {"cells": len(predicted_M), "doubted": float(doubted_M.mean())}
    if not doubted_M.all():
        test["accuracy_trusted"] = float(right_M[~doubted_M].mean())
    if doubted_M.any():
        test["accuracy_doubted"] = float(right_M[doubted_M].mean())
    return test


# Storage

_ARRAYS = ("head_CD", "bias_C", "genes_CV", "centres_CD", "spread_C", "share_V")
_NUMBERS = ("pooling", "layer", "temperature", "least_probability", "greatest_distance", "least_genes")


def save(uri: str, kept: Kept, vocabulary: Vocabulary) -> None:
    """Write a classifier's files; `publish` makes them an artifact."""
    weights: dict[str, torch.Tensor] = {f"encoder.{name}": p for name, p in kept.encoder.named_parameters()}
    weights |= {name: torch.from_numpy(np.asarray(getattr(kept, name), dtype=np.float32)) for name in _ARRAYS}
    checkpoint.write_tensors(files.join(uri, _WEIGHTS), weights)
    vocabulary.save(files.join(uri, _VOCABULARY))
    facts = {name: getattr(kept, name) for name in _NUMBERS} | {
        "classes": list(kept.classes), "encoder": parse.to_dict(kept.encoder.sizes), "vocabulary": vocabulary.hash, "about": kept.about,
    }  # fmt: skip
    files.write_json(files.join(uri, _FACTS), facts)


def publish(uri: str, folder: str, parents: dict[str, str]) -> None:
    """Copy the files that `save` wrote into a folder to `uri`, as an artifact."""
    about = files.read_json(files.join(folder, _FACTS))["about"]
    record = artifacts.plan(KIND, SCHEMA, {name: about[name] for name in ("model", "group", "split", "seed")}, parents)
    if not artifacts.begin(uri, record):
        return
    for name in _FILES:
        files.copy(files.join(folder, name), files.join(uri, name))
    finish(uri, record)


def finish(uri: str, record: artifacts.Record) -> dict[str, Any]:
    """Make the files that `save` wrote an artifact; returns its plain facts."""
    found = facts(uri)
    about: dict[str, Any] = found["about"]
    details = {"vocabulary": found["vocabulary"], "classes": found["classes"]} | about
    checksums = artifacts.checksums_of(uri, _FILES)
    artifacts.finish(uri, record, counts={"classes": len(found["classes"])}, files=checksums, details=details)
    return about


def facts(uri: str) -> dict[str, Any]:
    """Plain facts of a stored classifier; its weights are not read."""
    return dict(files.read_json(files.join(uri, _FACTS)))


def find(uri: str) -> str:
    """URI of a classifier: `uri` itself, that of `mixgf finetune`, or the only one of a classification, in the run at `uri`.

    Raises:
        UserError: there is none, or more than one.
    """
    for place in (uri, files.join(uri, "finetune"), files.join(uri, "classify")):
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
            keepable = [head for head, kind in registry.MODELS.items() if kind.can_keep]
            msg = f"--model {uri}: this classification kept no classifier; it needs {' or '.join(keepable)} among classify.models and classify.keep = true; make it again in another output"
            raise UserError(msg)
    msg = f"--model {uri}: no classifier there; `mixgf classify` makes them under OUTPUT/classify/{FOLDER}/, `mixgf finetune` makes OUTPUT/finetune"
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
