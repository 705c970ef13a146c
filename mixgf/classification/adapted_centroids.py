"""Class means that move towards the cells of another study, found without a label of its cells.

A study differs from the training cells in a common shift (`study_shift`), and in each type by itself. The second part is estimated
here. The cells of the study get labels by a classifier that was fitted to the training cells (pseudo-labels: Lee 2013). The mean of
each type is then taken over its training cells and these cells. The training cells' mean has the weight of `WEIGHT` cells: this is the
maximum a posteriori estimate of a mean (Gauvain & Lee 1994). So a few cells move it little, and a type without cells in the study
keeps its mean. The means move once: where a type of the study was not trained, further rounds take the means of others along.

Shape letters: N training cells, M cells of the study, H features, C classes.
"""

from __future__ import annotations

import numpy as np

from mixgf.arrays import Floats, Ints
from mixgf.classification.simple_classifiers import CentroidHead, unit

WEIGHT = 20.0
"""Cells that the mean of the training cells counts as."""


def adapted_centroids(
    train_NH: Floats, labels_N: Ints, study_MH: Floats, said_M: Ints, num_classes: int, *, temperature: float
) -> CentroidHead:
    """Nearest class mean by cosine, with means that moved towards the cells of a study.

    Args:
        train_NH: Training cells; they are scaled to length 1.
        labels_N: Class ids of the training cells.
        study_MH: Cells of the study, in the same features.
        said_M: Their class ids by a classifier of the training cells. A class without a training cell has none.
        num_classes: C.
        temperature: Of the cosines (`CentroidHead`).
    """
    train_NH, study_MH = unit(train_NH), unit(study_MH)
    has_C = np.bincount(labels_N, minlength=num_classes) > 0
    means_CH = np.zeros((num_classes, train_NH.shape[1]), dtype=train_NH.dtype)
    for c in np.flatnonzero(has_C):
        own_KH = study_MH[said_M == c]
        means_CH[c] = (WEIGHT * train_NH[labels_N == c].mean(0) + own_KH.sum(0)) / (WEIGHT + len(own_KH))
    return CentroidHead(unit(means_CH), has_C.astype(np.int64), temperature)
