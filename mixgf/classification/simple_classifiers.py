"""Simple classifiers on a matrix of features: a linear layer, nearest neighbours, nearest class mean.

Each function fits training cells and returns a head: arrays and numbers that predict other cells and can be stored.

Shape letters: N training cells, M cells to predict, H features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from scipy import sparse, special
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mixgf.arrays import Floats, Ints

MAX_ITERATIONS = 1000
STRENGTH = 100.0
"""scikit-learn's `C` for cells of length 1 (`readings`): weak enough that few cells of a type suffice."""
_NEVER = -1e9
"""Bias of a class without a training cell."""

Values: TypeAlias = Floats | sparse.csr_matrix
"""Features (M, H), dense or sparse."""
Predictor = Callable[[Any], Floats]
"""Features (M, H) to class probabilities (M, C)."""


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Softmax of a linear layer."""

    kind: ClassVar[str] = "linear"
    weights_CH: Floats
    bias_C: Floats

    def __call__(self, values_MH: Values) -> Floats:
        """Class probabilities (M, C)."""
        return np.asarray(special.softmax(values_MH @ self.weights_CH.T + self.bias_C, axis=1))


@dataclass(frozen=True, eq=False)
class NeighbourHead:
    """K nearest neighbours: the share of each class among them; ties go to the class that comes first."""

    kind: ClassVar[str] = "neighbours"
    train_NH: Floats
    labels_N: Ints
    num_classes: int
    number: int
    metric: str = "cosine"

    def __call__(self, values_MH: Floats) -> Floats:
        """Class probabilities (M, C)."""
        few = min(self.number, len(self.train_NH))
        fitted = KNeighborsClassifier(few, metric=self.metric, algorithm="brute").fit(self.train_NH, self.labels_N)
        out_MC = np.zeros((len(values_MH), self.num_classes))
        if len(values_MH):
            out_MC[:, fitted.classes_] = fitted.predict_proba(values_MH)
        return out_MC


@dataclass(frozen=True, eq=False)
class CentroidHead:
    """Nearest class mean by cosine: softmax of cosine / temperature. A class without a training cell has a mean of zeros."""

    kind: ClassVar[str] = "centroid"
    means_CH: Floats
    """Of length 1."""
    has_C: Ints
    """1 = the class has a training cell."""
    temperature: float = 0.1

    def __call__(self, values_MH: Floats) -> Floats:
        """Class probabilities (M, C)."""
        scores_MC = unit(values_MH) @ self.means_CH.T / self.temperature
        return np.asarray(special.softmax(np.where(self.has_C > 0, scores_MC, _NEVER), axis=1))


Head: TypeAlias = LinearHead | NeighbourHead | CentroidHead


def logistic_regression(
    train_NH: Values, labels_N: Ints, num_classes: int, *, strength: float = 1.0, balanced: bool = False
) -> LinearHead:
    """Multinomial logistic regression (ridge penalty, L-BFGS).

    Args:
        train_NH: Features.
        labels_N: Class ids.
        num_classes: C. A class without a training cell gets probability 0.
        strength: scikit-learn's `C`.
        balanced: Every class has the same weight in the loss, however many cells it has.
    """
    there = np.unique(labels_N)
    weights_CH, bias_C = np.zeros((num_classes, train_NH.shape[1])), np.full(num_classes, _NEVER)
    if len(there) == 1:  # nothing to tell apart
        bias_C[there] = 0.0
        return LinearHead(weights_CH, bias_C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit on iterations is part of the method
        fitted = LogisticRegression(
            C=strength, max_iter=MAX_ITERATIONS, class_weight="balanced" if balanced else None
        ).fit(train_NH, labels_N)
    if len(there) > 2:
        weights_CH[there], bias_C[there] = fitted.coef_, fitted.intercept_
    else:  # two classes have one row: the second against the first
        weights_CH[there[1]], bias_C[there] = fitted.coef_[0], [0.0, fitted.intercept_[0]]
    return LinearHead(weights_CH, bias_C)


def nearest_neighbours(
    train_NH: Floats, labels_N: Ints, num_classes: int, *, number: int, metric: str = "cosine"
) -> NeighbourHead:
    """The `number` nearest training cells vote."""
    return NeighbourHead(np.asarray(train_NH), labels_N, num_classes, number, metric)


def nearest_centroid(train_NH: Floats, labels_N: Ints, num_classes: int, *, temperature: float = 0.1) -> CentroidHead:
    """Nearest class mean by cosine. The probabilities are not calibrated."""
    has_C = np.bincount(labels_N, minlength=num_classes) > 0
    none_H = np.zeros(train_NH.shape[1])
    means_CH = unit(np.stack([train_NH[labels_N == c].mean(0) if has_C[c] else none_H for c in range(num_classes)]))
    return CentroidHead(means_CH, has_C.astype(np.int64), temperature)


def unit(rows: Floats) -> Floats:
    """Rows scaled to length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
