"""Nearest class centroid on variable genes that keep their own variance.

It shows how far expression alone goes without a trained classifier, and it is the example of a new model: one class in one file.
"""

from __future__ import annotations

from mixgf.classification import simple_classifiers
from mixgf.classification.models.baselines import one
from mixgf.classification.models.protocol import CountMatrix, CountsModel, Fitted, Problem
from mixgf.classification.readings import fit_reading


class GenesCentroid(CountsModel):
    """Nearest class mean, by cosine, on log-normalised variable genes that are centred within studies (`readings`).

    Genes are on one scale: they are not divided by their standard deviation, so a gene counts by how much it varies. `pseudobulk`
    is the same with z-scores. Centroids on log expression of chosen genes are those of scmap-cluster (Kiselev et al. 2018), which
    takes medians, other genes and a threshold for unassigned cells.
    """

    head, label, seconds = "genes_centroid", "variable genes on one scale, nearest centroid", 0.3

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        reading = fit_reading(problem, "expression")
        head = simple_classifiers.nearest_centroid(reading(problem.train), problem.labels, problem.num_classes)
        return one(reading, head)
