"""Where the cells of each type lie, and how far a cell is from the type that it is given.

Shape letters: N training cells, M cells, D width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from mixgf.arrays import Floats, Integers
from mixgf.classification.simple_classifiers import Values, unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Centre and spread of each class."""

    centres_CD: Floats
    """Mean direction of each class's training cells; zeros for a class without any."""
    spread_C: Floats
    """Mean cosine distance of a class's training cells to it."""

    @classmethod
    def fit(cls, values_ND: Values, labels_N: Integers, num_classes: int) -> Places:
        """Centres and spreads of training cells."""
        cosines = _unit_rows(values_ND)
        none_D = np.zeros(values_ND.shape[1])
        members = [labels_N == c for c in range(num_classes)]
        means = [np.asarray(cosines[mine].mean(0)).ravel() if mine.any() else none_D for mine in members]
        centres_CD = unit(np.stack(means).astype(np.float64))
        away_N = _away(cosines, centres_CD, labels_N)
        usual = max(float(away_N.mean()), 1e-9)
        # a class of a single cell has no spread: it takes the mean of all
        spread_C = np.array([away_N[mine].mean() if mine.sum() > 1 else usual for mine in members])
        return cls(centres_CD=centres_CD, spread_C=spread_C)

    def distances(self, values_MD: Values, predicted_M: Integers) -> Floats:
        """Cosine distance to the predicted class's centre, over the usual distance of that class's training cells."""
        away_M = _away(_unit_rows(values_MD), self.centres_CD, predicted_M)
        return np.asarray(away_M / np.maximum(self.spread_C[predicted_M], 1e-9))


def _unit_rows(values_MD: Values) -> Values:
    if isinstance(values_MD, np.ndarray):
        return unit(values_MD.astype(np.float64))
    lengths = np.sqrt(np.asarray(values_MD.multiply(values_MD).sum(1)).ravel())
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(lengths, 1e-12)) @ values_MD)


def _away(cosines_MD: Values, centres_CD: Floats, classes_M: Integers) -> Floats:
    scores_MC = np.asarray(cosines_MD @ centres_CD.T)
    return np.asarray(1 - scores_MC[np.arange(len(classes_M)), classes_M])
