"""Baselines on raw counts, scored on the same splits as the encoder's models.

Genes, scales, components and weights are fitted on training cells only. Between species, counts are in the space of one-to-one
orthologs and every feature is z-scored within its species (`features.Scale`). That uses the counts of the cells to predict, and
never their labels.

Shape letters: N training cells, M cells to predict, G genes, H chosen genes, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixgf.arrays import Floats, Names
from mixgf.classification import simple_classifiers
from mixgf.classification.features import Scale, log_normalise, principal_components, rank_scores, variable_genes
from mixgf.classification.models.protocol import CellSet, CountMatrix, CountsModel, Fitted, Problem


def _expression(problem: Problem[CountMatrix]) -> Callable[[CellSet[CountMatrix]], Floats]:
    """Log-normalised variable genes, z-scored within species, as a function from cells to features (M, H)."""
    logged = log_normalise(problem.train.x)
    genes = variable_genes(logged, problem.config.classify.num_hvgs)
    scale = Scale.fit(logged[:, genes].toarray(), problem.train.species)
    return lambda cells: scale(log_normalise(cells.x)[:, genes].toarray(), cells.species)


class Majority(CountsModel):
    """Every cell gets the class frequencies of the training cells."""

    head, label = "majority", "majority class"

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        shares_C = np.bincount(problem.labels, minlength=problem.num_classes) / len(problem.labels)
        return Fitted(predict=lambda cells: np.tile(shares_C, (cells.x.shape[0], 1)))


class HvgLogisticRegression(CountsModel):
    """Logistic regression on log-normalised, z-scored variable genes."""

    head, label, seconds = "hvg_logreg", "variable genes + logistic regression", 0.5

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        features = _expression(problem)
        head = simple_classifiers.logistic_regression(features(problem.train), problem.labels, problem.num_classes)
        return Fitted(predict=lambda cells: head(features(cells)))


class PcaNeighbours(CountsModel):
    """K nearest neighbours (Euclidean) on 50 principal components of log-normalised, z-scored variable genes."""

    head, label, seconds = "pca_knn", "PCA + 5-NN", 0.4

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        features = _expression(problem)
        train_NH = features(problem.train)
        components = principal_components(train_NH, problem.seed())
        head = simple_classifiers.nearest_neighbours(
            components(train_NH), problem.labels, problem.num_classes, number=problem.config.classify.knn,
            metric="euclidean",
        )  # fmt: skip
        return Fitted(predict=lambda cells: head(components(features(cells))))


class RankPca(CountsModel):
    """Normal scores of ranks within the cell (variable genes), 50 principal components, logistic regression."""

    head, label, seconds = "rank_pca", "rank z-scores + PCA", 1.2

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        genes = variable_genes(log_normalise(problem.train.x), problem.config.classify.num_hvgs)
        train_NH = rank_scores(problem.train.x, genes)
        within = Scale.fit(train_NH, problem.train.species) if problem.across else None

        def scaled(ranks_MH: Floats, species_M: Names) -> Floats:
            return ranks_MH if within is None else within(ranks_MH, species_M)

        train_NH = scaled(train_NH, problem.train.species)
        components = principal_components(train_NH, problem.seed())
        train_NK = components(train_NH)
        scale = Scale.fit(train_NK)
        head = simple_classifiers.logistic_regression(scale(train_NK), problem.labels, problem.num_classes)
        return Fitted(predict=lambda cells: head(scale(components(scaled(rank_scores(cells.x, genes), cells.species)))))


class Pseudobulk(CountsModel):
    """Nearest class mean, by cosine, on log-normalised, z-scored variable genes."""

    head, label, seconds = "pseudobulk", "nearest pseudobulk", 0.3

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        features = _expression(problem)
        head = simple_classifiers.nearest_centroid(features(problem.train), problem.labels, problem.num_classes)
        return Fitted(predict=lambda cells: head(features(cells)))
