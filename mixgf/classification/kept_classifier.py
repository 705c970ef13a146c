"""Kept classifiers: any model as arrays, its encoder if it has one, and limits beyond which a label is doubted.

All models have one file format. `readings.Classifier` turns counts, an encoder's vectors or ranks of genes into probabilities.
Temperature and limits are fitted on predictions of training cells by models that were not fitted to these cells (`validation`).
Each limit doubts a known share of those cells: `DOUBTED` by the probability and as many by the distance.

A classifier that reads counts is aligned to each file (`aligned`), which may be of another study or species.

Shapes: N cells, D width of a vector, C classes, V vocabulary, G genes of the counts, H chosen genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from scipy import optimize, sparse, special

from mixgf.arrays import Floats, Integers, Ints, Names
from mixgf.classification import linear_start, metrics, registry, validation
from mixgf.classification.encoders import CHECKPOINT
from mixgf.classification.features import log_normalise
from mixgf.classification.models.protocol import CellSet, Fitted, Measured, Model, Problem
from mixgf.classification.places import Places
from mixgf.classification.readings import Align, Classifier, Member, Reading, counts_of
from mixgf.classification.simple_classifiers import CentroidHead, Head, LinearHead, NeighbourHead
from mixgf.classification.splits import Split
from mixgf.classification.validation import Validation, measured
from mixgf.classification.workspace import Workspace
from mixgf.config import parse, training
from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.corpus import packed
from mixgf.encoder import checkpoint, embed
from mixgf.encoder.bert import Encoder
from mixgf.errors import UserError
from mixgf.genes.species import orthologs
from mixgf.genes.vocabulary import NUM_SPECIALS, Vocabulary
from mixgf.rng import hashed
from mixgf.storage import artifacts, files

KIND, SCHEMA = "classifier", 4
FOLDER = "classifiers"
"""Beside the tables of a classification, one classifier per group of cells."""
DOUBTED = 0.025
"""Share of the validation cells that lie beyond each limit."""
FEW_GENES = 0.01
"""Cells with fewer detected genes than this share of the training cells are doubted."""
UNSURE, FAR, SHALLOW, EMPTY = "unsure", "unlike its type", "few genes", "no known gene"
"""Reasons to doubt a label: its probability, its distance, too few genes. A cell without any gene of the vocabulary has no label."""
LEAST_PROBABILITY = 1e-4
"""Probabilities are at least this before they are calibrated: five neighbours give many zeros."""
NO_LIMIT = 1e9
"""A distance that no cell has."""
LEAST_CELLS, ROUNDS = 5, 10
"""Fewest cells of a type that take part in the alignment to a file, and most repetitions of it."""
_WEIGHTS, _FACTS, _VOCABULARY = "model.safetensors", "classifier.json", "vocabulary.parquet"
_FILES = (_WEIGHTS, _VOCABULARY, _FACTS)
LAST_FILE = _FACTS
"""The file that `save` writes last."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Limits:
    """Calibration of one form of a classifier."""

    temperature: float = 1.0
    """Log probabilities are divided by it (Guo et al. 2017)."""
    least_probability: float = 0.0
    greatest_distance: float = NO_LIMIT
    """In units of the class's spread (`places.Places`)."""

    @classmethod
    def fit(cls, found: Validation) -> Limits:
        """From predictions of cells that took no part in the fit."""
        logits_NC = log_probabilities(found.probabilities_NC)
        temperature = fit_temperature(logits_NC, found.labels_N)
        p_NC = special.softmax(logits_NC / temperature, axis=1)
        return cls(
            temperature=temperature, least_probability=float(np.quantile(p_NC.max(1), DOUBTED)),
            greatest_distance=float(np.quantile(found.distance_N, 1 - DOUBTED)),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """A classifier as it is stored and as `mixgf annotate` uses it."""

    classifier: Classifier
    encoder: Encoder | None
    """Encoder whose vectors it reads; None = it reads none."""
    classes: tuple[str, ...]
    pooling: str
    layer: LayerChoice
    """Hidden layer that is pooled, counted from the last, -1; `all` = all side by side."""
    genes: Names
    """Gene of each column of the counts that it reads (G,); none where it reads no counts."""
    gene_species: str
    """The species that these genes are of."""
    limits: Limits
    places: Places
    least_genes: int = 0
    share_V: Floats
    """How often each token occurs in the training sentences, as a share of all tokens."""
    means_CG: Floats = field(default_factory=lambda: np.empty((0, 0)))
    """Mean log-normalised expression of each class's training cells, for `aligned`; no rows where it is not aligned."""
    about: dict[str, Any] = field(default_factory=dict)
    """Plain facts: model, group, split, species and tokens of training, species rows, scores on the test cells, other models."""

    @property
    def reads(self) -> set[str]:
        """What it reads of a cell: `expression`, `vectors`, `ranks`."""
        return {reading.raw for member in self.classifier.members for reading in member.readings}

    @property
    def reads_counts(self) -> bool:
        """Whether raw counts are needed beside the sentences."""
        return "expression" in self.reads

    def cells(
        self, sentences: embed.SentenceSource, cells: Integers, counts_NG: sparse.csr_matrix | None, species: str
    ) -> CellSet[Measured]:
        """What the classifier reads of some cells.

        Args:
            sentences: Of the cells.
            cells: Their numbers in `sentences`.
            counts_NG: Their raw counts over `genes`, where it reads counts.
            species: Of the cells.
        """
        max_len, vectors, ranks = int(self.about["max_len"]), None, None
        if "vectors" in self.reads:
            assert self.encoder is not None, "vectors are of an encoder"
            vectors = embed.embed_cells(self.encoder, sentences, cells, self.pooling, self.layer, max_len=max_len)
        if "ranks" in self.reads:
            ranks = linear_start.gene_rows(*packed.truncate(*sentences.tokens(cells), max_len), len(self.share_V))
        study = np.full(len(cells), f"{species} file")
        return CellSet(Measured(counts=counts_NG, vectors=vectors, ranks=ranks), np.full(len(cells), species), study)

    def probabilities(self, cells: CellSet[Any]) -> Floats:
        """Calibrated class probabilities (N, C)."""
        logits_NC = log_probabilities(self.classifier(cells))
        return np.asarray(special.softmax(logits_NC / self.limits.temperature, axis=1))

    def distances(self, cells: CellSet[Any], predicted_N: Integers) -> Floats:
        """Distance to the predicted class (`places.Places`)."""
        return self.places.distances(self.classifier.places(cells), predicted_N)

    def doubts(self, probabilities_NC: Floats, distance_N: Floats, genes_N: Integers) -> list[str]:
        """Reasons to doubt each cell's label, joined by `; `; empty = none."""
        tests = (
            (UNSURE, probabilities_NC.max(1) < self.limits.least_probability),
            (FAR, distance_N > self.limits.greatest_distance),
            (SHALLOW, genes_N < self.least_genes),
        )
        return ["; ".join(name for name, hit_N in tests if hit_N[i]) for i in range(len(genes_N))]

    def columns(self, species: str, genes: Names) -> Ints:
        """Column of the file's counts that each of `genes` is (G,); -1 = the file does not have it.

        Args:
            species: Of the file.
            genes: Gene of each column of its counts.
        """
        wanted = self.genes.tolist()
        if species != self.gene_species:
            pairs = orthologs(self.about["orthologs"]).get((self.gene_species, species), {})
            wanted = [pairs.get(gene, "") for gene in wanted]
        place = {gene: i for i, gene in enumerate(genes.tolist())}
        return np.array([place.get(gene, -1) for gene in wanted], dtype=np.int64)

    def without(self, absent_G: Any) -> Kept:
        """The classifier for cells that lack some genes: they count as the mean of the training cells."""
        if not self.reads_counts or not absent_G.any():
            return self

        def lacking(reading: Reading) -> Reading:
            return replace(reading, absent_H=absent_G[reading.columns_H]) if reading.raw == "expression" else reading

        return replace(self, classifier=self.classifier.map_readings(lacking))


def log_probabilities(p_NC: Floats) -> Floats:
    """Log of probabilities, none below `LEAST_PROBABILITY`."""
    return np.log(np.maximum(p_NC, LEAST_PROBABILITY))


def fit_temperature(logits_NC: Floats, labels_N: Integers) -> float:
    """The divisor of the logits with the lowest log loss (Guo et al. 2017), between 1/2 and 20.

    The lower bound keeps a few validation cells that are all predicted correctly from making every probability 0 or 1.
    """

    def loss(log_t: float) -> float:
        scaled = logits_NC / np.exp(log_t)
        return float((special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels_N)), labels_N]).mean())

    bounds = (float(np.log(0.5)), float(np.log(20)))
    return float(np.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


# Another study


def aligned(kept: Kept, cells: CellSet[Measured]) -> Kept:
    """The classifier for a file of another study or species, whose labels are not known.

    Expression is read relative to a shifted mean. For each type, the training cells' mean is subtracted from that of the
    file's cells. The shift is the mean of these differences, so it does not depend on how many cells of each type a file has. Types of the file's
    cells are the predicted ones: first without a shift, then with it, until none changes. A type of fewer than `LEAST_CELLS` cells is
    left out. For a file like the training cells the shift is small.

    Args:
        kept: The classifier, without the genes that the file lacks.
        cells: Cells of the file (`Kept.cells`), a sample of a large one.
    """
    if not kept.means_CG.size or cells.x.counts is None:
        return kept
    logged_MG = log_normalise(cells.x.counts)
    made, said_M = kept, kept.classifier(cells).argmax(1)
    for _ in range(ROUNDS):
        there = [c for c in range(len(kept.classes)) if (said_M == c).sum() >= LEAST_CELLS]
        if not there:
            return kept
        differences = [np.asarray(logged_MG[said_M == c].mean(0)).ravel() - kept.means_CG[c] for c in there]
        made = _shifted(kept, np.mean(differences, axis=0))
        before_M, said_M = said_M, made.classifier(cells).argmax(1)
        if (said_M == before_M).all():
            break
    return replace(made, about=kept.about | {"form": "aligned"})


def _shifted(kept: Kept, shift_G: Floats) -> Kept:
    """The classifier with expression read relative to a mean that is higher by `shift_G`."""

    def moved(reading: Reading) -> Reading:
        if reading.raw != "expression":
            return reading
        return replace(reading, mean_H=(reading.mean_H + shift_G[reading.columns_H]).astype(np.float32))

    return replace(kept, classifier=kept.classifier.map_readings(moved))


# From a classification


def wanted(run: Config, split: Split) -> bool:
    """Whether classifiers trained on this split may be kept: seed 0 of the first kind of split within a group, all labels and types."""
    kinds = [kind for kind in run.classify.splits if kind in ("random", "donor")]
    return run.classify.keep and split.whole and split.seed == 0 and kinds[:1] == [split.kind]


def keepable(model: Model) -> bool:
    """Whether a model can be kept: it is arrays, and reads no encoder but the run's own."""
    return model.can_keep and model.encoder in {None, CHECKPOINT}


@dataclass(frozen=True)
class Fit:
    """A model that was fitted to a split of a classification."""

    workspace: Workspace
    split: Split
    """The cells that it was fitted to are `split.train`, without `split.validation` if the model trains an encoder."""
    model: Model
    problem: Problem[Any]
    fitted: Fitted[Any]


def validate(fit: Fit) -> Validation:
    """`validation.validate` on the training cells of a split."""
    run, split, problem = fit.workspace.config, fit.split, fit.problem
    table = fit.workspace.table.only(split.train)
    by, fold_N = validation.folds_of(table.datasets, table.donors, problem.labels, run.seed)
    trained = any(keepable(other) and other.trains_encoder for other in registry.scored(run.classify, split))
    return validation.validate(fit.model, problem, fit.fitted, fold_N, by=by, also_split=trained)


def all_cells(workspace: Workspace, split: Split) -> Split:
    """All labelled cells of the group, test cells included, with every type that has two cells or more, as training cells."""
    table = workspace.table
    rows = np.flatnonzero(table.groups == split.group)
    types, counts = np.unique(table.labels[rows], return_counts=True)
    types = types[counts >= 2]
    none = np.empty(0, dtype=np.int64)
    return replace(
        split, kind="all", classes=tuple(types.tolist()), train=rows[np.isin(table.labels[rows], types)], validation=none,
        test=none, dropped={},
    )  # fmt: skip


def assemble(fit: Fit, found: Validation, *, test: dict[str, float]) -> Kept:
    """A classifier to keep.

    Args:
        fit: The model.
        found: Its validation, for the limits.
        test: Scores on test cells, by `test_scores`.
    """
    workspace, split, model, problem, fitted = fit.workspace, fit.split, fit.model, fit.problem, fit.fitted
    run, corpus, table = workspace.config, workspace.corpus, workspace.table
    assert fitted.classifier is not None, "a model to keep has arrays"
    rows = np.setdiff1d(split.train, split.validation) if model.trains_encoder else split.train
    train, labels_N = (
        (problem.learning, problem.labels[~problem.is_validation])
        if model.trains_encoder
        else (problem.train, problem.labels)
    )
    # cells of other studies are read relative to the training cells
    classifier = fitted.classifier.map_readings(lambda reading: replace(reading, align=Align.NONE))
    places = Places.fit(classifier.places(measured(fitted, train, run)), labels_N, len(split.classes))
    genes = workspace.split_counts(split, split.train)[1] if model.reads_counts else np.empty(0, dtype=np.str_)
    encoder = fitted.encoder
    if encoder is None and model.reads_vectors:
        encoder = workspace.load_encoder(CHECKPOINT, torch.device("cpu"))
    genes_N = genes_of(corpus, table.cells[rows])
    tokens_T = corpus.tokens(table.cells[rows])[0]
    tokens_T = tokens_T[tokens_T >= NUM_SPECIALS]
    species = sorted(set(table.species[rows].tolist()))
    about = {
        "model": model.name, "group": split.group, "split": split.kind, "seed": split.seed, "max_len": fitted.max_len,
        "tokens": parse.to_dict(corpus.token_settings), "species": species,
        "species_rows": corpus.record.config.get("species", []), "label": run.classify.label, "training_cells": len(rows),
        "sources": sorted(set(table.sources[rows].tolist())), "orthologs": list(run.vocab.orthologs),
        "knn": run.classify.knn, "num_hvgs": run.classify.num_hvgs, "form": "as trained",
        "validation": {"cells": len(found.main.rows_N), "by": found.main.by, "loss": _loss(found.main),
                       "accuracy": found.main.accuracy, "macro_f1": found.main.macro_f1}, "test": test,
    }  # fmt: skip
    means_CG = np.empty((0, 0))
    if model.reads_counts and run.classify.align:
        logged_NG = log_normalise(counts_of(problem.train.x))
        means = [np.asarray(logged_NG[problem.labels == c].mean(0)).ravel() for c in range(len(split.classes))]
        means_CG = np.stack(means)
    return Kept(
        classifier=classifier, encoder=encoder, means_CG=means_CG, classes=split.classes, pooling=run.embed.pooling,
        layer=run.embed.layer if fitted.layer is None else fitted.layer, genes=genes, gene_species=species[0], places=places,
        limits=Limits.fit(found.main), least_genes=int(np.quantile(genes_N, FEW_GENES)), about=about,
        share_V=np.bincount(tokens_T, minlength=corpus.vocabulary.size) / max(len(tokens_T), 1),
    )  # fmt: skip


def genes_of(corpus: Any, cells: Integers) -> Ints:
    """Detected genes of cells of a corpus."""
    numbers = corpus.obs(["n_genes"])["n_genes"].to_numpy() if "n_genes" in corpus.columns else corpus.lengths_N
    return np.asarray(numbers[cells], dtype=np.int64)


def _loss(found: Validation) -> float:
    p_NC = special.softmax(log_probabilities(found.probabilities_NC) / Limits.fit(found).temperature, axis=1)
    return float(-np.log(p_NC[np.arange(len(p_NC)), found.labels_N]).mean())


def test_scores(kept: Kept, fit: Fit) -> dict[str, float]:
    """Scores on the split's test cells: all metrics, the share of doubted cells, and accuracy with and without them."""
    split, seed, cells = fit.split, fit.workspace.config.seed, fit.workspace.table.only(fit.split.test)
    genes_M = genes_of(fit.workspace.corpus, cells.cells)
    target = measured(fit.fitted, fit.problem.target, fit.problem.config)
    true_M, p_MC = split.ids(cells.labels), kept.probabilities(target)
    predicted_M = p_MC.argmax(1)
    doubts = kept.doubts(p_MC, kept.distances(target, predicted_M), genes_M)
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

_HEADS: dict[str, type[Head]] = {one.kind: one for one in (LinearHead, NeighbourHead, CentroidHead)}
_NUMBERS = ("pooling", "layer", "least_genes", "gene_species")


def _flatten(one: Any, prefix: str, arrays: dict[str, Any], skip: Sequence[str] = ()) -> dict[str, Any]:
    """Fields of a dataclass: numeric arrays into `arrays`, numbers and text as plain data."""
    facts: dict[str, Any] = {}
    for name in [f.name for f in fields(one) if f.name not in skip]:
        value = getattr(one, name)
        if isinstance(value, np.ndarray):
            arrays[f"{prefix}{name}"] = value
        elif isinstance(value, Align):
            facts[name] = value.name
        elif isinstance(value, dict):  # of arrays
            facts[name] = sorted(value)
            arrays |= {f"{prefix}{name}.{i}": value[key] for i, key in enumerate(sorted(value))}
        else:
            facts[name] = value
    return facts


def _restore(kind: Any, facts: dict[str, Any], prefix: str, arrays: dict[str, Any]) -> Any:
    """The dataclass that `_flatten` took apart."""
    made: dict[str, Any] = {}
    for name in [f.name for f in fields(kind)]:
        if f"{prefix}{name}" in arrays:
            made[name] = arrays[f"{prefix}{name}"]
        elif name in facts and isinstance(facts[name], list):
            made[name] = {key: arrays[f"{prefix}{name}.{i}"] for i, key in enumerate(facts[name])}
        elif name == "align":
            made[name] = Align[facts[name]]
        elif name in facts:
            made[name] = facts[name]
    return kind(**made)


def save(uri: str, kept: Kept, vocabulary: Vocabulary) -> None:
    """Write a classifier's files; `publish` makes them an artifact."""
    arrays: dict[str, Any] = {"share_V": kept.share_V, "means_CG": kept.means_CG}
    weights: dict[str, torch.Tensor] = {}
    if kept.encoder is not None:
        weights |= {f"encoder.{name}": p for name, p in kept.encoder.named_parameters()}
    members = []
    for i, member in enumerate(kept.classifier.members):
        readings = [_flatten(r, f"members.{i}.readings.{j}.", arrays) for j, r in enumerate(member.readings)]
        head = {"kind": member.head.kind} | _flatten(member.head, f"members.{i}.head.", arrays)
        members.append({"readings": readings, "head": head})
    facts = {name: getattr(kept, name) for name in _NUMBERS} | {
        "members": members, "limits": _flatten(kept.limits, "limits.", arrays), "places": _flatten(kept.places, "places.", arrays),
        "classes": list(kept.classes), "vocabulary": vocabulary.hash, "about": kept.about,
        "encoder": None if kept.encoder is None else parse.to_dict(kept.encoder.sizes),
    }  # fmt: skip
    if len(kept.genes):
        place = {gene: i for i, gene in enumerate(vocabulary.species_genes(kept.gene_species).genes.tolist())}
        arrays["genes"] = np.array([place[gene] for gene in kept.genes.tolist()], dtype=np.int32)
    weights |= {name: torch.from_numpy(_stored(value)) for name, value in arrays.items()}
    checkpoint.write_tensors(files.join(uri, _WEIGHTS), weights)
    vocabulary.save(files.join(uri, _VOCABULARY))
    files.write_json(files.join(uri, _FACTS), facts)


def _stored(value: np.ndarray) -> np.ndarray:
    """Numbers as they are stored: float32, and whole numbers as they are."""
    return np.ascontiguousarray(value.astype(np.float32) if value.dtype.kind == "f" else value)


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
            able = [head for head, kind in registry.MODELS.items() if kind.can_keep]
            msg = f"--model {uri}: this classification kept no classifier; it needs {' or '.join(able)} among classify.models and classify.keep = true; make it again in another output"
            raise UserError(msg)
    msg = f"--model {uri}: no classifier there; `mixgf classify` makes them under OUTPUT/classify/{FOLDER}/, `mixgf finetune` makes OUTPUT/finetune"
    raise UserError(msg)


def load(uri: str, device: torch.device | str = "cpu") -> tuple[Kept, Vocabulary, artifacts.Record]:
    """A published classifier, its vocabulary and its record."""
    record = artifacts.require(uri, KIND, SCHEMA)
    return *read(uri, device, record.files.get(_WEIGHTS)), record


def read(uri: str, device: torch.device | str = "cpu", expected: Any = None) -> tuple[Kept, Vocabulary]:
    """A classifier and its vocabulary, from the files that `save` wrote.

    Args:
        uri: Their folder.
        device: Where the encoder computes.
        expected: Checksum of the weights; None = not checked.
    """
    found = facts(uri)
    tensors = checkpoint.read_tensors(files.join(uri, _WEIGHTS), expected)
    vocabulary = Vocabulary.load(files.join(uri, _VOCABULARY))
    if vocabulary.hash != found["vocabulary"]:
        msg = f"{uri}: its {_VOCABULARY} is not the one it was trained with; restore it"
        raise UserError(msg)
    encoder = None
    if found["encoder"] is not None:
        encoder = Encoder(parse.from_dict(training.Model, found["encoder"]), vocabulary.size)
        mine = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
        checkpoint.load_weights(encoder, mine, uri)
        encoder = encoder.to(device).eval()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items() if not name.startswith("encoder.")}
    members = []
    for i, one in enumerate(found["members"]):
        readings = [_restore(Reading, r, f"members.{i}.readings.{j}.", arrays) for j, r in enumerate(one["readings"])]
        head = _restore(_HEADS[one["head"]["kind"]], one["head"], f"members.{i}.head.", arrays)
        members.append(Member(readings=tuple(readings), head=head))
    names = np.asarray(vocabulary.species_genes(found["gene_species"]).genes, dtype=np.str_)
    genes = names[arrays["genes"]] if "genes" in arrays else np.empty(0, dtype=np.str_)
    kept = Kept(
        classifier=Classifier(members=tuple(members)), encoder=encoder, classes=tuple(found["classes"]), genes=genes,
        limits=_restore(Limits, found["limits"], "limits.", arrays), places=_restore(Places, found["places"], "places.", arrays),
        share_V=arrays["share_V"], about=found["about"], means_CG=arrays["means_CG"],
        **{name: found[name] for name in _NUMBERS},
    )  # fmt: skip
    return kept, vocabulary
