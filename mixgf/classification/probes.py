"""Moved here from mixgf/classify.py."""

from __future__ import annotations

import numpy as np

from mixgf.arrays import Floats
from mixgf.classification import baselines
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import Split
from mixgf.config.classification import Classify

# Frozen vectors


def frozen(
    head: str, train_ND: Floats, test_MD: Floats, *, table: Labelled, split: Split, settings: Classify
) -> Floats:
    """Class probabilities (M, C) by a simple classifier on frozen vectors.

    `knn` is the published "zero-shot": the nearest training cells by cosine, with their labels (geneformer_family B6.4).
    Between species, vectors are first z-scored within each species, as those of the baselines are.

    Args:
        head: One of `registry.HEADS`.
        train_ND: Vectors of `split.train`.
        test_MD: Vectors of `split.test`.
        table: The labelled cells.
        split: Which of them train and which are tested.
        settings: `config.classify`.
    """
    labels, num_classes = split.ids(table.labels[split.train]), len(split.classes)
    species = (table.species[split.train], table.species[split.test])
    if len(np.union1d(*species)) > 1:
        train_ND, test_MD = baselines.standardise(train_ND, test_MD, *species)
    if head == "knn":
        return baselines.neighbours(train_ND, labels, test_MD, num_classes, number=settings.knn, metric="cosine")
    if head == "probe":
        train_ND, test_MD = baselines.standardise(train_ND, test_MD, *baselines.one_group(train_ND, test_MD))
        return baselines.logistic(train_ND, labels, test_MD, num_classes)
    assert head == "centroid", head
    return baselines.centroids(train_ND, labels, test_MD, num_classes)
