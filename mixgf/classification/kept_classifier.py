"""Kept classifiers: any model as arrays, its encoder if it has one, and limits beyond which a label is doubted.

All models have one file format. `readings.Classifier` turns counts, an encoder's vectors or ranks of genes into probabilities.
Temperature and limits are fitted on predictions of training cells by models that were not fitted to these cells (`validation`).
Each limit doubts a known share of those cells: `DOUBTED` by the probability and as many by the distance.

A classifier that reads counts carries some of its training cells. With these it is aligned to each file (`for_study`), which may be
of another study or species.

Shapes: N cells, D width of a vector, C classes, V vocabulary, G genes of the counts, H chosen genes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy import optimize, sparse, special

from mixgf.arrays import Bools, Floats, Integers, Ints, Names
from mixgf.classification import linear_start, metrics, registry, study_shift, validation
from mixgf.classification.encoders import CHECKPOINT
from mixgf.classification.labels import ids_of_labels
from mixgf.classification.models.protocol import CellSet, Fitted, Measured, Model, Problem, counts_of
from mixgf.classification.places import Places
from mixgf.classification.readings import Align, Classifier, Member, Reading
from mixgf.classification.simple_classifiers import CentroidHead, Head, LinearHead, NeighbourHead
from mixgf.classification.splits import Split
from mixgf.classification.validation import Validation, measured
from mixgf.classification.workspace import Workspace, as_column, vector_column
from mixgf.config import parse, training
from mixgf.config.classification import Classify
from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.corpus import packed
from mixgf.corpus.packed import offsets_of
from mixgf.encoder import checkpoint, embed
from mixgf.encoder.bert import Encoder
from mixgf.errors import UserError
from mixgf.genes.species import orthologs
from mixgf.genes.vocabulary import NUM_SPECIALS, Vocabulary
from mixgf.rng import hashed
from mixgf.storage import artifacts, files, model_store, tables
from mixgf.storage.sealed import read_sealed, write_sealed

KIND, SCHEMA = "classifier", 5
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
MOST_CELLS, LEAST_GENES = 5_000, 50
"""Most training cells that a classifier carries, and fewest genes with which it is fitted to a file."""
AS_TRAINED, ALIGNED, REFITTED = "as trained", "aligned", "fitted again and aligned"
"""Forms of a classifier: as it was kept, and as `for_study` makes it for a file."""
_WEIGHTS, _FACTS, _VOCABULARY, _CELLS = "model.safetensors", "classifier.json", "vocabulary.parquet", "cells.parquet"
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
    reference: Reference | None = None
    """Training cells for `for_study`; None where the classifier reads no counts, is not aligned, or has been fitted to a file."""
    axes_HK: Floats = field(default_factory=lambda: np.empty((0, 0)))
    """Directions in which the cells of a file differ most, for clusters of them (`clusters.components`); no numbers = none."""
    across: str = ""
    """The model that `for_study` fits to a file of another species, or one that lacks genes."""
    limits_across: Limits = field(default_factory=Limits)
    """Calibration of that model."""
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


# Another study or species


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Training cells that a classifier carries, with which it is fitted to a file of another study or species."""

    counts_NG: sparse.csr_matrix
    """Raw counts over `Kept.genes`."""
    vectors_ND: Floats
    """Vectors of the encoder, where the model reads them; else no columns."""
    labels_N: Ints
    studies_N: Ints
    """Place of each cell's study in `studies`."""
    studies: tuple[tuple[str, str], ...]
    """Species and data set of each study."""

    @classmethod
    def of(cls, cells: CellSet[Any], labels_N: Ints, seed: int) -> Reference:
        """A sample of training cells: at most `MOST_CELLS`, and as many of each type as of any other, as far as they go."""
        rows = balanced_rows(labels_N, MOST_CELLS, seed)
        counts, picked = sparse.csr_matrix(counts_of(cells.x)[rows]), cells[rows]
        vectors = cells.x.vectors if isinstance(cells.x, Measured) else None
        names = picked.species if picked.datasets is None else picked.datasets
        pairs = list(zip(picked.species.tolist(), names.tolist(), strict=True))
        studies = sorted(set(pairs))
        return cls(
            counts_NG=counts, vectors_ND=np.empty((len(rows), 0), np.float32) if vectors is None else vectors[rows],
            labels_N=labels_N[rows], studies_N=np.array([studies.index(pair) for pair in pairs]), studies=tuple(studies),
        )  # fmt: skip

    def fewer(self, most: int, seed: int) -> Reference | None:
        """At most `most` of the cells; None = none."""
        rows = balanced_rows(self.labels_N, most, seed)
        sizes = np.bincount(self.labels_N)
        if (np.bincount(self.labels_N[rows], minlength=len(sizes)) < np.minimum(sizes, 1)).any():
            return None  # a type without a cell could not be fitted
        return replace(
            self, counts_NG=sparse.csr_matrix(self.counts_NG[rows]), vectors_ND=self.vectors_ND[rows],
            labels_N=self.labels_N[rows], studies_N=self.studies_N[rows],
        )  # fmt: skip

    def cells(self, columns: Ints) -> CellSet[Any]:
        """The cells as a model sees them, over some of the genes."""
        counts = sparse.csr_matrix(self.counts_NG[:, columns])
        x = Measured(counts=counts, vectors=self.vectors_ND) if self.vectors_ND.shape[1] else counts
        species, datasets = (np.array([pair[i] for pair in self.studies])[self.studies_N] for i in range(2))
        return CellSet(x, species, datasets)


def balanced_rows(labels_N: Ints, most: int, seed: int) -> Ints:
    """At most `most` rows, ascending: all of the rare types, and equally many of the others."""
    sizes = np.bincount(labels_N)
    totals = np.minimum(sizes[None], np.arange(1, min(int(sizes.max()), most) + 1)[:, None]).sum(1)
    each = int(np.searchsorted(totals, most, side="right"))  # the most of a type with which all fit
    order = np.random.default_rng([seed, 19]).permutation(len(labels_N))
    grouped = order[np.argsort(labels_N[order], kind="stable")]
    place = np.arange(len(grouped)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(grouped[place < each])


def carrying(kept: Kept, most: int | None) -> Kept:
    """The classifier with at most `most` cells that it carries; None = all. Too few for one of each type: none."""
    if most is None or kept.reference is None:
        return kept
    return replace(kept, reference=kept.reference.fewer(most, int(kept.about["seed"])))


def for_study(kept: Kept, cells: CellSet[Measured], measured_G: Bools) -> Kept:
    """The classifier for a file of another study or species, whose labels are not known.

    Expression is read relative to a shifted mean (`study_shift`). For a file like the training cells the shift is small. A file of
    another species lacks genes that the classifier reads. Then a model is fitted (`Kept.across`), to the cells that the classifier
    carries and to the genes that both have.

    Args:
        kept: The classifier.
        cells: Cells of the file (`Kept.cells`), a sample of a large one.
        measured_G: Genes of `Kept.genes` that the file measures.
    """
    if kept.reference is None or cells.x.counts is None:
        return kept.without(~measured_G)
    read = [r.columns_H for member in kept.classifier.members for r in member.readings if r.raw == "expression"]
    whole = bool(measured_G[np.concatenate(read)].all())
    found_G = measured_G
    if not whole:
        for counts in (cells.x.counts, kept.reference.counts_NG):
            found_G = found_G & (np.asarray(counts.sum(0)).ravel() > 0)
    columns = np.flatnonzero(found_G)
    if len(columns) < LEAST_GENES:
        return kept.without(~measured_G)
    problem, study = _problem(kept, cells, columns), str(cells.studies[0])
    if whole:
        shift_G = np.zeros(len(kept.genes), dtype=np.float32)
        shift_G[columns] = study_shift.shifts(problem)[study]
        return replace(
            _shifted(kept.without(~measured_G), shift_G), reference=None, about=kept.about | {"form": ALIGNED}
        )
    fitted = registry.parse(kept.across).fit(problem)
    assert fitted.classifier is not None, "a model to keep has arrays"

    def for_file(reading: Reading) -> Reading:
        centre = reading.centres[study] if reading.raw == "expression" else reading.mean_H
        return replace(reading, centres={study: centre}, mean_H=centre, deviations={}, align=Align.NONE)

    places = Places.fit(fitted.classifier.places(problem.train), problem.labels, problem.num_classes)
    return replace(
        kept, classifier=fitted.classifier.map_readings(for_file), places=places, genes=kept.genes[columns], reference=None,
        limits=kept.limits_across, about=kept.about | {"form": REFITTED, "form_genes": len(columns), "form_model": kept.across},
    )  # fmt: skip


def _problem(kept: Kept, cells: CellSet[Measured], columns: Ints) -> Problem[Any]:
    """The cells that the classifier carries as training cells, and cells of a file to predict, over some genes."""
    assert kept.reference is not None, "a classifier of counts carries cells"
    counts = sparse.csr_matrix(counts_of(cells.x)[:, columns])
    x = Measured(counts=counts, vectors=cells.x.vectors) if kept.reference.vectors_ND.shape[1] else counts
    about, labels_N = kept.about, kept.reference.labels_N
    settings = Classify(knn=about["knn"], num_hvgs=about["num_hvgs"])
    return Problem(
        config=Config(classify=settings, seed=about["seed"]), train=kept.reference.cells(columns), labels=labels_N,
        num_classes=len(kept.classes), is_validation=np.zeros(len(labels_N), dtype=bool),
        target=CellSet(x, cells.species, cells.datasets), by_types=True,
    )  # fmt: skip


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


def model_across(chosen: str, names: Iterable[str]) -> str:
    """The model for files of another species, or with other genes: the preferred one of those that centre by types, else the chosen one.

    Validation says nothing of other species, as all training cells are of known studies.
    """
    able = [name for name in registry.PREFERRED if name in names and registry.parse(name).by_types]
    return able[0] if able else chosen


def assemble(
    fit: Fit, found: Validation, *, test: dict[str, float], across: tuple[str, Validation] | None = None
) -> Kept:  # fmt: skip
    """A classifier to keep.

    Args:
        fit: The model.
        found: Its validation, for the limits.
        test: Scores on test cells, by `test_scores`.
        across: Name and validation of the model for files of another species (`model_across`); None = the model itself.
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
        "label_ids": ids_of_labels(corpus, run.classify, table.cells[rows], table.labels[rows]),
        "knn": run.classify.knn, "num_hvgs": run.classify.num_hvgs, "form": AS_TRAINED,
        "validation": {"cells": len(found.main.rows_N), "by": found.main.by, "loss": _loss(found.main),
                       "accuracy": found.main.accuracy, "macro_f1": found.main.macro_f1}, "test": test,
    }  # fmt: skip
    reference = None
    if model.reads_counts and run.classify.align:
        reference = Reference.of(problem.train, problem.labels, run.seed)
    named, validated = across or (model.name, found)
    return Kept(
        across=named, limits_across=Limits.fit(validated.main), classifier=classifier, encoder=encoder, reference=reference, classes=split.classes, pooling=run.embed.pooling,
        layer=run.embed.layer if fitted.layer is None else fitted.layer, genes=genes, gene_species=species[0], places=places,
        limits=Limits.fit(found.main), least_genes=int(np.quantile(genes_N, FEW_GENES)), about=about,
        share_V=np.bincount(tokens_T, minlength=corpus.vocabulary.size) / max(len(tokens_T), 1),
    )  # fmt: skip


def genes_of(corpus: Any, cells: Integers) -> Ints:
    """Detected genes of cells of a corpus; tokens of the sentence where the number is not known, as in an imported corpus."""
    lengths_M = np.asarray(corpus.lengths_N[cells], dtype=np.int64)
    if "n_genes" not in corpus.columns:
        return lengths_M
    known_M = corpus.obs(["n_genes"])["n_genes"].to_numpy(dtype=np.float64, na_value=np.nan)[cells]
    return np.where(np.isnan(known_M), lengths_M, known_M).astype(np.int64)


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
_NUMBERS = ("pooling", "layer", "least_genes", "gene_species", "across")


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


def save(uri: str, kept: Kept, vocabulary: Vocabulary, *, half: bool = False) -> None:
    """Write a classifier's files; `publish` makes them an artifact. `half`: numbers in half precision."""
    arrays: dict[str, Any] = {"share_V": kept.share_V, "axes_HK": kept.axes_HK}
    weights: dict[str, torch.Tensor] = {}
    if kept.encoder is not None:
        weights |= {f"encoder.{name}": p for name, p in kept.encoder.named_parameters()}
    members = []
    for i, member in enumerate(kept.classifier.members):
        readings = [_flatten(r, f"members.{i}.readings.{j}.", arrays) for j, r in enumerate(member.readings)]
        head = {"kind": member.head.kind} | _flatten(member.head, f"members.{i}.head.", arrays)
        members.append({"readings": readings, "head": head, "weight": member.weight})
    facts = {name: getattr(kept, name) for name in _NUMBERS} | {
        "members": members, "limits": _flatten(kept.limits, "limits.", arrays),
        "limits_across": _flatten(kept.limits_across, "limits_across.", arrays), "places": _flatten(kept.places, "places.", arrays),
        "classes": list(kept.classes), "vocabulary": vocabulary.hash, "about": kept.about,
        "encoder": None if kept.encoder is None else parse.to_dict(kept.encoder.sizes),
        "carries_cells": kept.reference is not None,
    }  # fmt: skip
    if len(kept.genes):
        place = {gene: i for i, gene in enumerate(vocabulary.species_genes(kept.gene_species).genes.tolist())}
        arrays["genes"] = np.array([place[gene] for gene in kept.genes.tolist()], dtype=np.int32)
    weights |= {name: torch.from_numpy(_stored(value)) for name, value in arrays.items()}
    if half:
        weights = {
            name: _halved(value) if name.startswith(("encoder.", "members.")) else value
            for name, value in weights.items()
        }
    checkpoint.write_tensors(files.join(uri, _WEIGHTS), weights)
    vocabulary.save(files.join(uri, _VOCABULARY))
    if kept.reference is not None:
        _write_reference(files.join(uri, _CELLS), kept.reference)
    write_sealed(files.join(uri, _FACTS), facts)


def _write_reference(uri: str, reference: Reference) -> None:
    """One row per cell: its genes (places in `Kept.genes`) and their counts, its class, study, and vector."""
    counts = sparse.csr_matrix(reference.counts_NG)
    counts.sort_indices()
    offsets = pa.array(counts.indptr.astype(np.int32))
    lists = {
        "genes": pa.ListArray.from_arrays(offsets, pa.array(counts.indices.astype(np.int32))),
        "counts": pa.ListArray.from_arrays(offsets, pa.array(counts.data.astype(np.int32))),
    }
    numbers = {"label": pa.array(reference.labels_N, pa.int32()), "study": pa.array(reference.studies_N, pa.int32())}
    vectors = {"vector": as_column(reference.vectors_ND.astype(np.float32))} if reference.vectors_ND.shape[1] else {}
    studies = {"studies": json.dumps([list(pair) for pair in reference.studies]), "num_genes": str(counts.shape[1])}
    table = pa.table(lists | numbers | vectors).replace_schema_metadata(studies)
    packed = dict.fromkeys(("genes.list.element", "counts.list.element"), "DELTA_BINARY_PACKED")
    tables.write_table(
        uri, table, use_dictionary=False, column_encoding=packed, compression="zstd", compression_level=12
    )


def _read_reference(uri: str) -> Reference:
    table = tables.read_table(uri)
    genes, counts = (table[name].combine_chunks() for name in ("genes", "counts"))
    offsets = offsets_of(genes.value_lengths().to_numpy())
    parts = (counts.flatten().to_numpy().astype(np.float32), genes.flatten().to_numpy(), offsets)
    meta = table.schema.metadata
    vectors = vector_column(table) if "vector" in table.column_names else np.empty((table.num_rows, 0), np.float32)
    return Reference(
        counts_NG=sparse.csr_matrix(parts, shape=(table.num_rows, int(meta[b"num_genes"]))), vectors_ND=vectors,
        labels_N=table["label"].to_numpy().astype(np.int64), studies_N=table["study"].to_numpy().astype(np.int64),
        studies=tuple((a, b) for a, b in json.loads(meta[b"studies"])),
    )  # fmt: skip


def _halved(value: torch.Tensor) -> torch.Tensor:
    """In half precision, where all numbers fit."""
    made = value.detach().half() if value.is_floating_point() else value
    return made if bool(torch.isfinite(made).all()) else value


def _stored(value: np.ndarray) -> np.ndarray:
    """Numbers as they are stored: float32, and whole numbers as they are. A copy: members may share an array, the file may not."""
    return np.array(value, dtype=np.float32 if value.dtype.kind == "f" else value.dtype, order="C")


def publish(uri: str, folder: str, parents: dict[str, str]) -> None:
    """Copy the files that `save` wrote into a folder to `uri`, as an artifact."""
    found = facts(folder)
    about = found["about"]
    record = artifacts.plan(KIND, SCHEMA, {name: about[name] for name in ("model", "group", "split", "seed")}, parents)
    if not artifacts.begin(uri, record):
        return
    for name in _names(found):
        files.copy(files.join(folder, name), files.join(uri, name))
    finish(uri, record)


def _names(found: dict[str, Any]) -> list[str]:
    """Files of a classifier, by its facts."""
    return [_WEIGHTS, _VOCABULARY, *([_CELLS] if found["carries_cells"] else []), _FACTS]


def finish(uri: str, record: artifacts.Record) -> dict[str, Any]:
    """Make the files that `save` wrote an artifact; returns its plain facts."""
    found = facts(uri)
    about: dict[str, Any] = found["about"]
    details = {"vocabulary": found["vocabulary"], "classes": found["classes"]} | about
    checksums = artifacts.checksums_of(uri, _names(found))
    artifacts.finish(uri, record, counts={"classes": len(found["classes"])}, files=checksums, details=details)
    return about


def facts(uri: str) -> dict[str, Any]:
    """Plain facts of a stored classifier; its weights are not read."""
    return read_sealed(files.join(uri, _FACTS))


def find(uri: str) -> str:
    """URI of a classifier: `uri` itself, that of `mixgf finetune`, or the only one of a classification, in the run at `uri`.

    `uri` may also be a published model, by its folder or its name (`model_store.resolve`).

    Raises:
        UserError: there is none, or more than one.
    """
    uri = model_store.resolve(uri)
    for place in (uri, files.join(uri, "finetune"), files.join(uri, "classify")):
        record = artifacts.find(place)
        if record is not None and record.kind == KIND:
            return place
        classified = record is not None and record.kind == "classification"
        published = record is None and files.exists(files.join(place, model_store.MANIFEST))
        folder = files.join(place, FOLDER)
        names = files.list_dir(folder) if classified or published else []
        if len(names) == 1:
            return files.join(folder, names[0].rstrip("/"))
        if names:
            listed = ", ".join(files.join(folder, n.rstrip("/")) for n in names[:8])
            msg = f"--model {uri}: {len(names)} classifiers there, one per group of cells; name one of {listed}"
            raise UserError(msg)
        if classified:
            able = [head for head, kind in registry.MODELS.items() if kind.can_keep]
            msg = f"--model {uri}: this classification kept no classifier; it needs {' or '.join(able)} among classify.models and classify.keep = true; make it again in another output"
            raise UserError(msg)
    named = model_store.names()
    there = f"; models with a name: {', '.join(named)}" if named else ""
    msg = f"--model {uri}: no classifier there; `mixgf classify` makes them under OUTPUT/classify/{FOLDER}/, `mixgf finetune` makes OUTPUT/finetune{there}"
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
    # a published classifier may hold half precision
    wide = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    arrays = {name: tensor.numpy() for name, tensor in wide.items() if not name.startswith("encoder.")}
    members = []
    for i, one in enumerate(found["members"]):
        readings = [_restore(Reading, r, f"members.{i}.readings.{j}.", arrays) for j, r in enumerate(one["readings"])]
        head = _restore(_HEADS[one["head"]["kind"]], one["head"], f"members.{i}.head.", arrays)
        members.append(Member(readings=tuple(readings), head=head, weight=one.get("weight", 1.0)))
    names = np.asarray(vocabulary.species_genes(found["gene_species"]).genes, dtype=np.str_)
    genes = names[arrays["genes"]] if "genes" in arrays else np.empty(0, dtype=np.str_)
    reference = _read_reference(files.join(uri, _CELLS)) if found["carries_cells"] else None
    kept = Kept(
        classifier=Classifier(members=tuple(members)), encoder=encoder, classes=tuple(found["classes"]), genes=genes,
        limits=_restore(Limits, found["limits"], "limits.", arrays),
        limits_across=_restore(Limits, found["limits_across"], "limits_across.", arrays), places=_restore(Places, found["places"], "places.", arrays),
        share_V=arrays["share_V"], axes_HK=arrays["axes_HK"], about=found["about"], reference=reference,
        **{name: found[name] for name in _NUMBERS},
    )  # fmt: skip
    return kept, vocabulary
