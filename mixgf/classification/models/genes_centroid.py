"""Nearest class centroid on variable genes that keep their own variance.

It shows how far expression alone goes without a trained classifier, and it is the example of a new model: one class in one file.

Shape letters: N training cells, M cells to predict, H chosen genes, C classes.
"""

from __future__ import annotations

import numpy as np

from mixgf.arrays import Floats
from mixgf.classification import simple_classifiers
from mixgf.classification.features import log_normalise, variable_genes
from mixgf.classification.models.protocol import CellSet, CountMatrix, CountsModel, Fitted, Problem


class GenesCentroid(CountsModel):
    """Nearest class mean, by cosine, on log-normalised variable genes that are centred within species.

    Genes are on one scale: they are not divided by their standard deviation, so a gene counts by how much it varies. `pseudobulk`
    is the same with z-scores. Centroids on log expression of chosen genes are those of scmap-cluster (Kiselev et al. 2018), which
    takes medians, other genes and a threshold for unassigned cells.

    The centre is the mean of a species' training cells. Cells of a species without training cells are centred on their own mean.
    """

    head, label, seconds = "genes_centroid", "variable genes on one scale, nearest centroid", 0.3

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        logged = log_normalise(problem.train.x)
        genes = variable_genes(logged, problem.config.classify.num_hvgs)
        train_NH, species_N = logged[:, genes].toarray(), problem.train.species
        centres = {name: train_NH[species_N == name].mean(0) for name in np.unique(species_N).tolist()}

        def centred(cells: CellSet[CountMatrix]) -> Floats:
            values_MH = log_normalise(cells.x)[:, genes].toarray()
            for name in np.unique(cells.species).tolist():
                mine = cells.species == name
                values_MH[mine] -= centres.get(name, values_MH[mine].mean(0))
            return values_MH

        head = simple_classifiers.nearest_centroid(centred(problem.train), problem.labels, problem.num_classes)
        return Fitted(predict=lambda cells: head(centred(cells)))
