"""Labels by majority over small clusters of cells, as CellTypist has them (Domínguez Conde et al. 2022).

Cells of one small cluster are mostly of one type, even where their single labels differ. So all of them get the most frequent label
of the cluster. CellTypist finds clusters by Leiden at a high resolution. Here they come from k-means on the principal
components of the file's cells, which is in scikit-learn and takes any number of cells.

Shape letters: N cells, H features of a reading, K components.
"""

from __future__ import annotations

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import TruncatedSVD

from mixgf.arrays import Floats, Ints, Names
from mixgf.classification.features import NUM_COMPONENTS
from mixgf.classification.simple_classifiers import Values, unit

CELLS_PER_CLUSTER, MOST_CLUSTERS = 30, 600
"""Mean number of cells of a cluster, and most clusters of a file."""


def components(values_MH: Values, seed: int = 0) -> Floats:
    """At most 50 directions (H, K) in which some cells of a file differ most, by a truncated SVD."""
    few = min(NUM_COMPONENTS, values_MH.shape[1] - 1, values_MH.shape[0] - 1)
    if few < 1:
        return np.zeros((values_MH.shape[1], 1), dtype=np.float32)
    found = TruncatedSVD(few, random_state=seed).fit(values_MH)
    return np.ascontiguousarray(found.components_.T.astype(np.float32))


def vectors(values_NH: Values, components_HK: Floats) -> Floats:
    """Cells as directions in the space of `components` (N, K), float32."""
    return unit(np.asarray(values_NH @ components_HK, dtype=np.float32))


def find(vectors_NK: Floats, seed: int = 0) -> Ints:
    """Cluster of each cell (N,)."""
    number = min(MOST_CLUSTERS, max(1, round(len(vectors_NK) / CELLS_PER_CLUSTER)))
    made = MiniBatchKMeans(number, random_state=seed, n_init=3, batch_size=4096)
    return np.asarray(made.fit_predict(vectors_NK), dtype=np.int64)


def majority(labels_N: Names, clusters_N: Ints) -> tuple[Names, Floats]:
    """The most frequent label of each cell's cluster, and the share of the cluster's cells that have it.

    Of equally frequent labels the first in alphabetical order is taken.
    """
    names, label_N = np.unique(labels_N, return_inverse=True)
    ids, cluster_N = np.unique(clusters_N, return_inverse=True)
    votes = np.zeros((len(ids), len(names)), dtype=np.int64)
    np.add.at(votes, (cluster_N, label_N), 1)
    winner, share = votes.argmax(1), votes.max(1) / votes.sum(1)
    return names[winner[cluster_N]], share[cluster_N]
