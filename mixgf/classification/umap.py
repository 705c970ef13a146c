"""Two coordinates per cell, for maps. The same vectors and seed give the same map."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.neighbors import NearestNeighbors

from mixgf.jit import start_threads

MIN_UMAP_CELLS = 200
"""Fewest cells for a UMAP; fewer cells have too few neighbours."""


def layout(vectors_ND: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Two coordinates per cell (N, 2), and the method: UMAP, or principal components where there are few cells."""
    if len(vectors_ND) >= MIN_UMAP_CELLS:
        return umap_layout(vectors_ND, seed), "UMAP (15 cosine neighbours)"
    centred = vectors_ND.astype(np.float64) - vectors_ND.mean(axis=0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    u = u[:, :2] * np.where(u[np.abs(u[:, :2]).argmax(axis=0), [0, 1]] < 0, -1, 1)
    return np.asarray(u * s[:2]), "First two principal components"


def umap_layout(vectors_ND: np.ndarray, seed: int) -> np.ndarray:
    """UMAP of the cells, (N, 2): 15 nearest neighbours by cosine, the same for the same vectors and seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns of threads and of its search index; neither is used
        start_threads()
        import umap

        k = min(15, len(vectors_ND) - 1)
        found = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(vectors_ND)
        distance_NK, index_NK = found.kneighbors(vectors_ND)
        state = int(np.random.default_rng([seed, 0x554D4150]).integers(2**31))
        fit = umap.UMAP(n_neighbors=k, random_state=state, n_jobs=1, metric="cosine", n_epochs=200,
                        precomputed_knn=(index_NK, distance_NK, None))  # fmt: skip
        return np.asarray(fit.fit_transform(vectors_ND), dtype=np.float64)
