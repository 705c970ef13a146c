"""CellTypist's way (Domínguez Conde et al. 2022): logistic regression by stochastic gradient descent, and a majority vote over clusters.

As in its `train(use_SGD=True, feature_selection=True)`: counts are scaled to 10,000 and log1p-transformed, genes are z-scored
and cut at 10. A first regression over all genes chooses `TOP_GENES` genes of each type by the size of their weights; a second
one over these genes predicts. Regressions are one type against the rest, and the type with the highest score is taken.

`celltypist_vote` adds its `majority_voting=True`: cells to predict are clustered finely without labels, and each cluster gets its
commonest type. CellTypist clusters with Leiden at a high resolution. Here k-means by cosine on principal components takes its place, so
that no further package is needed. There are twice as many clusters as the square root of the number of cells. `VOTERS` or fewer cells
are not clustered, as there. A type with fewer cells than a cluster may be outvoted.

The package itself does not train with the present scikit-learn.

Shape letters: N training cells, M cells to predict, G genes, H chosen genes, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special
from sklearn.cluster import KMeans
from sklearn.linear_model import SGDClassifier

from mixgf.arrays import Floats, Ints
from mixgf.classification.features import log_normalise, principal_components, variable_genes
from mixgf.classification.models.protocol import CellSet, CountMatrix, CountsModel, Fitted, Problem
from mixgf.classification.simple_classifiers import unit

PENALTY, MAX_ITERATIONS, TOP_GENES = 1e-4, 1000, 300
LARGEST = 10.0
"""Largest z-score."""
VOTERS, NUM_COMPONENTS = 50, 20


@dataclass(frozen=True, eq=False)
class ZScores:
    """Z-scores of log-normalised genes, cut at `LARGEST`."""

    genes_H: Ints
    mean_H: Floats
    deviation_H: Floats

    @classmethod
    def fit(cls, counts: CountMatrix) -> ZScores:
        """Mean and standard deviation of the genes that any cell has."""
        logged = log_normalise(counts)
        genes_H = np.flatnonzero(np.bincount(logged.indices, minlength=logged.shape[1]))
        dense_NH = logged[:, genes_H].toarray()
        deviation_H = dense_NH.std(0)
        return cls(genes_H, dense_NH.mean(0), np.where(deviation_H > 0, deviation_H, 1))

    def __call__(self, counts: CountMatrix) -> Floats:
        """Values (M, H)."""
        dense_MH = log_normalise(counts)[:, self.genes_H].toarray()
        return np.minimum((dense_MH - self.mean_H) / self.deviation_H, LARGEST)

    def only(self, places: Ints) -> ZScores:
        """Some of the genes."""
        return ZScores(self.genes_H[places], self.mean_H[places], self.deviation_H[places])


class CellTypist(CountsModel):
    """Two rounds of one-against-rest logistic regression: see the module."""

    head, label, seconds, can_keep = "celltypist", "CellTypist's regression", 25.0, False

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        scores = ZScores.fit(problem.train.x)
        values_NH = scores(problem.train.x)
        if len(np.unique(problem.labels)) == 1:  # nothing to tell apart
            only_C = np.eye(problem.num_classes)[problem.labels[0]]
            return Fitted(predict=lambda cells: np.tile(only_C, (cells.x.shape[0], 1)))
        first = _regression(values_NH, problem.labels, problem.seed(1))
        places = top_genes(first.coef_, TOP_GENES)
        chosen, second = scores.only(places), _regression(values_NH[:, places], problem.labels, problem.seed(2))

        def predict(cells: CellSet[CountMatrix]) -> Floats:
            decision = second.decision_function(chosen(cells.x))
            odds = np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision
            out_MC = np.zeros((cells.x.shape[0], problem.num_classes))
            out_MC[:, second.classes_] = one_against_rest(odds)
            return out_MC

        return Fitted(predict=predict, notes={"genes": len(places)})


class CellTypistVote(CellTypist):
    """The same with a majority vote over clusters of the cells to predict; these are seen without labels."""

    head, label, seconds = "celltypist_vote", "CellTypist's regression and vote (unlabelled test cells seen)", 25.0

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        single = super().fit(problem)

        def predict(cells: CellSet[CountMatrix]) -> Floats:
            own_MC = single.predict(cells)
            if len(own_MC) <= VOTERS:
                return own_MC
            return vote(own_MC, clusters(cells.x, problem.config.classify.num_hvgs, problem.seed(3)))

        return Fitted(predict=predict, notes=single.notes)


def _regression(values_NH: Floats, labels_N: Ints, seed: int) -> SGDClassifier:
    return SGDClassifier(loss="log_loss", alpha=PENALTY, max_iter=MAX_ITERATIONS, random_state=seed).fit(
        values_NH, labels_N
    )


def one_against_rest(odds_MC: Floats) -> Floats:
    """Class probabilities (M, C) from log odds of each class against the rest, the largest where the odds are."""
    sigmoid_MC = special.expit(np.maximum(odds_MC, -500)) + 1e-9 * special.softmax(
        odds_MC, axis=1
    )  # several may round to 1
    return sigmoid_MC / sigmoid_MC.sum(1, keepdims=True)


def clusters(counts: CountMatrix, num_hvgs: int, seed: int) -> Ints:
    """Cluster of each cell (M,): k-means by cosine on principal components of log-normalised variable genes."""
    logged = log_normalise(counts)
    dense_MH = logged[:, variable_genes(logged, num_hvgs)].toarray()
    dense_MH -= dense_MH.mean(0)
    space_MK = unit(dense_MH @ principal_components(dense_MH, seed, NUM_COMPONENTS))
    return KMeans(round(2 * len(space_MK) ** 0.5), n_init=1, random_state=seed).fit_predict(space_MK)


def top_genes(weights_CH: Floats, number: int) -> Ints:
    """Columns that are among the `number` largest absolute weights of any class, ascending."""
    if number >= weights_CH.shape[1]:
        return np.arange(weights_CH.shape[1])
    return np.unique(np.argpartition(np.abs(weights_CH), -number, axis=1)[:, -number:])


def vote(probabilities_MC: Floats, cluster_M: Ints) -> Floats:
    """Share of each class among the predicted labels of the cell's cluster, (M, C)."""
    votes_KC = np.zeros((cluster_M.max() + 1, probabilities_MC.shape[1]))
    np.add.at(votes_KC, (cluster_M, probabilities_MC.argmax(1)), 1.0)
    return (votes_KC / np.maximum(votes_KC.sum(1, keepdims=True), 1))[cluster_M]
