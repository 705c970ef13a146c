"""What the expression of another study or species is read relative to, found without a label of its cells.

The mean of a study depends on how many cells of each type it has, so it is no fair centre where two studies differ in this. Here
the shift between two studies is the mean over types of (mean of the study's cells of the type - mean of the training cells of the
type), times the share of it that types have in common. So a difference of one type, or of a few cells, moves the others
little. With one type there is no shift. The types of the study's cells are predicted by a logistic regression on variable
genes: first without a shift, then with it, until none changes (pseudo-labels: Lee 2013).

Shape letters: N training cells, M cells of the study, G genes, H variable genes, C classes.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from scipy import sparse

from mixgf.arrays import Floats, Ints, Names
from mixgf.classification import simple_classifiers
from mixgf.classification.features import log_normalise, variable_genes
from mixgf.classification.models.protocol import Problem, counts_of

LEAST_CELLS, ROUNDS = 5, 10
"""Fewest cells of a type that take part in the shift, and most repetitions."""
_FOUND: WeakKeyDictionary[Problem[Any], dict[str, Floats]] = WeakKeyDictionary()


def shifts(problem: Problem[Any]) -> dict[str, Floats]:
    """The shift (G,) of each study among the cells to predict that has no training cells, to add to the training cells' mean."""
    if problem not in _FOUND:
        train, target = problem.train, problem.target
        new = np.setdiff1d(target.studies, train.studies).tolist()
        if not new:
            return {}
        logged_NG = log_normalise(counts_of(train.x))
        logged_MG = log_normalise(counts_of(target.x))
        made = _Types(logged_NG, problem.labels, train.studies, problem.num_classes, problem.config.classify.num_hvgs)
        _FOUND[problem] = {study: made.shift(logged_MG[target.studies == study]) for study in new}
    return _FOUND[problem]


class _Types:
    """A classifier of types for the shift, and the mean expression of each type."""

    def __init__(
        self, logged_NG: sparse.csr_matrix, labels_N: Ints, studies_N: Names, num_classes: int, num_hvgs: int
    ) -> None:
        self.columns_H = variable_genes(logged_NG, num_hvgs)
        values_NH = logged_NG[:, self.columns_H].toarray()
        self.mean_H = values_NH.mean(0)
        for study in np.unique(studies_N):
            values_NH[studies_N == study] -= values_NH[studies_N == study].mean(0)
        self.head = simple_classifiers.logistic_regression(
            simple_classifiers.unit(values_NH), labels_N, num_classes, strength=simple_classifiers.STRENGTH, balanced=True
        )  # fmt: skip
        rows = sparse.csr_matrix((np.ones(len(labels_N)), (labels_N, np.arange(len(labels_N)))))
        self.means_CG = np.asarray((rows @ logged_NG).todense()) / np.maximum(np.bincount(labels_N), 1)[:, None]

    def shift(self, logged_MG: sparse.csr_matrix) -> Floats:
        """The shift (G,) of the cells of a study; zeros where fewer than two types have `LEAST_CELLS` of them."""
        values_MH = logged_MG[:, self.columns_H].toarray()
        shift_G, said_M = np.zeros(logged_MG.shape[1], dtype=np.float32), np.empty(0, dtype=np.int64)
        for _ in range(ROUNDS + 1):
            before_M = said_M
            said_M = self.head(simple_classifiers.unit(values_MH - self.mean_H - shift_G[self.columns_H])).argmax(1)
            there = np.flatnonzero(np.bincount(said_M, minlength=len(self.means_CG)) >= LEAST_CELLS)
            if not len(there) or np.array_equal(said_M, before_M):
                break
            of_types_TG = np.stack(
                [np.asarray(logged_MG[said_M == c].mean(0)).ravel() - self.means_CG[c] for c in there]
            )
            shift_G = (common_share(of_types_TG[:, self.columns_H]) * of_types_TG.mean(0)).astype(np.float32)
        return shift_G


def common_share(differences_TH: Floats) -> float:
    """Share of the squared length of a mean of T vectors that they have in common, from 0 to 1; 0 for a single vector.

    The mean product of two different vectors estimates the squared length of what they have in common: noise that each has for
    itself cancels there, but not in the squared length of their mean.
    """
    number = len(differences_TH)
    if number < 2:
        return 0.0
    whole, own = float((differences_TH.sum(0) ** 2).sum()), float((differences_TH**2).sum())
    return min(max((whole - own) / (number * (number - 1)), 0.0) / max(whole / number**2, 1e-12), 1.0)
