"""Simple classifiers on a matrix of features: logistic regression, nearest neighbours, nearest class mean.

Each function fits training cells and returns the function that predicts other cells.

Shape letters: N training cells, M cells to predict, H features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy import sparse, special
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mixgf.arrays import Floats, Ints

MAX_ITERATIONS = 1000

Predictor = Callable[[Floats], Floats]
"""Features (M, H) to class probabilities (M, C)."""


def logistic_regression(train_NH: Floats, labels_N: Ints, num_classes: int) -> Predictor:
    """Multinomial logistic regression (ridge penalty, C = 1, L-BFGS)."""
    fitted = _fit_logistic(train_NH, labels_N)
    return lambda values_MH: _all_classes(fitted.predict_proba(values_MH), fitted.classes_, num_classes)


def logistic_layer(train_NH: Floats | sparse.csr_matrix, labels_N: Ints, num_classes: int) -> tuple[Floats, Floats]:
    """The same regression as a linear layer, weights (C, H) and bias (C,); the softmax of its output is the probability.

    Args:
        train_NH: Features.
        labels_N: Class ids, each class at least once.
        num_classes: C.
    """
    fitted = _fit_logistic(train_NH, labels_N)
    assert len(fitted.classes_) == num_classes, "every class has a training cell"
    if num_classes > 2:
        return fitted.coef_, fitted.intercept_
    zeros = np.zeros_like(fitted.coef_)  # two classes have one row: the second against the first
    return np.concatenate([zeros, fitted.coef_]), np.concatenate([np.zeros(1), fitted.intercept_])


def scaled_logistic_layer(train_NH: Floats, labels_N: Ints, num_classes: int) -> tuple[Floats, Floats]:
    """Logistic regression on z-scored features as a layer on the features themselves: weights (C, H) and bias (C,)."""
    mean_H, sd_H = train_NH.mean(0), train_NH.std(0)
    scale_H = np.divide(1, sd_H, out=np.zeros_like(sd_H), where=sd_H > 1e-8)
    weights_CH, bias_C = logistic_layer((train_NH - mean_H) * scale_H, labels_N, num_classes)
    weights_CH = weights_CH * scale_H
    return weights_CH, bias_C - weights_CH @ mean_H


def _fit_logistic(train_NH: Floats | sparse.csr_matrix, labels_N: Ints) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit on iterations is part of the method
        return LogisticRegression(max_iter=MAX_ITERATIONS).fit(train_NH, labels_N)


def nearest_neighbours(train_NH: Floats, labels_N: Ints, num_classes: int, *, number: int, metric: str) -> Predictor:
    """K nearest neighbours: the share of each class among them; ties go to the class that comes first."""
    few = min(number, len(train_NH))
    fitted = KNeighborsClassifier(few, metric=metric, algorithm="brute").fit(train_NH, labels_N)
    return lambda values_MH: _all_classes(fitted.predict_proba(values_MH), fitted.classes_, num_classes)


def nearest_centroid(train_NH: Floats, labels_N: Ints, num_classes: int, *, temperature: float = 0.1) -> Predictor:
    """Nearest class mean by cosine: softmax of cosine / temperature. The probabilities are not calibrated."""
    means_CH = unit(np.stack([train_NH[labels_N == c].mean(0) for c in range(num_classes)]))
    return lambda values_MH: special.softmax(unit(values_MH) @ means_CH.T / temperature, axis=1)


def unit(rows: Floats) -> Floats:
    """Rows scaled to length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def _all_classes(probabilities: Floats, classes: Ints, num_classes: int) -> Floats:
    """Probabilities with a column of zeros for every class that has no training cell."""
    out = np.zeros((len(probabilities), num_classes))
    out[:, classes] = probabilities
    return out
