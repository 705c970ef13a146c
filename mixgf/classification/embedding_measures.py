"""Measures of an embedding: mixing of species and data sets, separation of cell types, and agreement of two embeddings.

Silhouettes, NMI and ARI are scikit-learn's, combined as in scIB (Luecken et al. 2022). LISI (Korsunsky et al. 2019) is computed by
scib-metrics where that is installed (`pip install 'mixgf[baselines]'`). Probes are linear classifiers that predict the species from
a vector, on known data sets and on data sets without training cells.

Shape letters: N cells, D width, T types.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pandas as pd
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples, silhouette_score
from sklearn.neighbors import NearestNeighbors

from mixgf.arrays import Floats, Ints, Names
from mixgf.classification import metrics, simple_classifiers
from mixgf.classification.features import Scale
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import random_order
from mixgf.stats.intervals import Interval

MIN_TYPE_CELLS = 5
"""Fewest cells of a type, in each species, for its centroid to be compared."""


def cosine_distances(a_AD: np.ndarray, b_BD: np.ndarray) -> np.ndarray:
    """1 - cosine between the rows of two matrices, shape (A, B)."""
    norm_a = a_AD / np.maximum(np.linalg.norm(a_AD, axis=1, keepdims=True), 1e-12)
    norm_b = b_BD / np.maximum(np.linalg.norm(b_BD, axis=1, keepdims=True), 1e-12)
    return np.asarray(1 - norm_a @ norm_b.T)


def centroid_table(centres: dict[tuple[str, str], np.ndarray], first: str, second: str) -> pd.DataFrame:
    """Cosine distances between the type centroids of two species: rows `first`'s types, columns `second`'s."""
    rows = [t for s, t in centres if s == first]
    columns = [t for s, t in centres if s == second]
    shared = [t for t in rows if t in columns]
    rows, columns = shared + [t for t in rows if t not in shared], shared + [t for t in columns if t not in shared]
    if not rows or not columns:
        return pd.DataFrame()
    values = cosine_distances(
        np.stack([centres[first, t] for t in rows]), np.stack([centres[second, t] for t in columns])
    )
    return pd.DataFrame(values, index=rows, columns=columns)


def counterparts(table: pd.DataFrame) -> tuple[int, int]:
    """How many types of both species have their counterpart as nearest centroid, and how many types both species have."""
    shared = [t for t in table.index if t in set(table.columns)]
    return sum(str(table.loc[t].idxmin()) == t for t in shared), len(shared)


FOLDS = 5
MIN_CELLS = 5
"""Fewest cells of a type, in each species or data set, for it to be compared between them."""
NONE = float("nan")


def measure(vectors_ND: Floats, cells: Labelled, *, seed: int) -> dict[str, tuple[Interval, str]]:
    """Every measure that these cells allow, with its 95 % interval (NaN where there is none) and what was resampled.

    | measure | best |
    |---|---|
    | `type_silhouette`, `type_nmi`, `type_ari`: separation of types | 1 |
    | `species_mixing`, `source_mixing`: silhouette of batches within types | 1 |
    | `species_probe`: balanced accuracy of a linear probe on new cells of known data sets | 1/2 for two species |
    | `species_probe_new_sets`: the same on data sets without training cells | 1/2 for two species |

    Args:
        vectors_ND: Frozen vectors.
        cells: The same cells; folds depend on their names, and their sources are the data sets.
        seed: Seed of KMeans, the folds and the resamples.
    """
    found: dict[str, tuple[Interval, str]] = {}
    types_N, species_N, sources_N = cells.labels, cells.species, cells.sources

    def add(name: str, value: float) -> None:
        found[name] = Interval(value, NONE, NONE), ""

    if len(np.unique(types_N)) > 1:
        add("type_silhouette", (1 + float(silhouette_score(vectors_ND, types_N))) / 2)
        guess_N = KMeans(len(np.unique(types_N)), n_init=1, random_state=seed).fit_predict(vectors_ND)
        add("type_nmi", float(normalized_mutual_info_score(types_N, guess_N)))
        add("type_ari", float(adjusted_rand_score(types_N, guess_N)))
    add("species_mixing", mixing(vectors_ND, types_N, species_N))
    add("source_mixing", mixing(vectors_ND, np.char.add(np.char.add(species_N, "\x1f"), types_N), sources_N))
    if find_spec("scib_metrics") is not None:
        for name, value in _lisi(vectors_ND, {"species": species_N, "source": sources_N}).items():
            add(f"{name}_lisi", value)
    if len(np.unique(species_N)) > 1:
        found |= _probes(vectors_ND, cells, seed)
    return {name: one for name, one in found.items() if np.isfinite(one[0].value)}


def mixing(vectors_ND: Floats, types_N: Names, batches_N: Names) -> float:
    """1 - |silhouette| of the batches within each type that has several, mean over types (scIB's batch silhouette)."""
    values = []
    for kind in np.unique(types_N):
        rows = np.flatnonzero(types_N == kind)
        batches, counts = np.unique(batches_N[rows], return_counts=True)
        rows = rows[np.isin(batches_N[rows], batches[counts >= MIN_CELLS])]
        if (counts >= MIN_CELLS).sum() > 1:
            values.append(float((1 - np.abs(silhouette_samples(vectors_ND[rows], batches_N[rows]))).mean()))
    return float(np.mean(values)) if values else NONE


def _probes(vectors_ND: Floats, cells: Labelled, seed: int) -> dict[str, tuple[Interval, str]]:
    found = {}
    types_N, species_N, sources_N = cells.labels, cells.species, cells.sources
    rng = np.random.default_rng([seed, 17])
    shared = shared_types(types_N, species_N)
    rows = np.flatnonzero(np.isin(types_N, shared))
    if len(rows):
        fold_N = np.empty(len(rows), dtype=np.int64)
        fold_N[random_order(cells.names[rows], "species probe", seed)] = np.arange(len(rows)) % FOLDS
        found["species_probe"] = _read(
            vectors_ND[rows], species_N[rows], fold_N, cells.donors[rows], rng=rng, unit="donor"
        )
    sources, fold_N = np.unique(sources_N, return_inverse=True)
    species_of = np.array([species_N[sources_N == s][0] for s in sources])
    if min((species_of == s).sum() for s in np.unique(species_N)) > 1:  # each species is left in another data set
        found["species_probe_new_sets"] = _read(vectors_ND, species_N, fold_N, sources_N, rng=rng, unit="source")
    return found


def shared_types(types_N: Names, species_N: Names) -> Names:
    """Types with at least `MIN_CELLS` cells in every species."""
    pairs = [(types_N == t, t) for t in np.unique(types_N)]
    kept = [t for mine, t in pairs if all((mine & (species_N == s)).sum() >= MIN_CELLS for s in np.unique(species_N))]
    return np.asarray(kept, dtype=np.str_)


def _read(
    vectors_ND: Floats, species_N: Names, fold_N: Ints, clusters_N: Names, *, rng: np.random.Generator, unit: str
) -> tuple[Interval, str]:
    """Balanced accuracy of a logistic probe for the species; each fold is predicted by a probe fitted to the other folds."""
    species, label_N = np.unique(species_N, return_inverse=True)
    guess_N = np.empty(len(label_N), dtype=np.int64)
    for fold in np.unique(fold_N):
        out = fold_N == fold
        scale = Scale.fit(vectors_ND[~out])
        probe = simple_classifiers.logistic_regression(scale(vectors_ND[~out]), label_N[~out], len(species))
        guess_N[out] = probe(scale(vectors_ND[out])).argmax(1)
    found, by = metrics.score(
        label_N.astype(np.int64), guess_N, np.ones(len(label_N)), clusters_N, len(species), rng=rng
    )
    return found["balanced_accuracy"], unit if by == "donor" else by


def _lisi(vectors_ND: Floats, batches: dict[str, Names]) -> dict[str, float]:
    """Integration LISI, scaled to 0 (apart) to 1 (mixed), by scib-metrics on 90 nearest neighbours."""
    import scib_metrics  # noqa: PLC0415 (optional)
    from scib_metrics.nearest_neighbors import NeighborsResults  # noqa: PLC0415 (optional)

    number = min(90, len(vectors_ND))
    distance_NK, index_NK = (
        NearestNeighbors(n_neighbors=number, algorithm="brute").fit(vectors_ND).kneighbors(vectors_ND)
    )
    near = NeighborsResults(indices=index_NK, distances=distance_NK)
    return {name: float(scib_metrics.ilisi_knn(near, of)) for name, of in batches.items() if len(np.unique(of)) > 1}


# Two embeddings of the same cells


def aligned(xy_N2: Floats, to_N2: Floats) -> Floats:
    """Coordinates rotated, mirrored and shifted onto others of the same cells (orthogonal Procrustes), without scaling.

    The axes of a UMAP are arbitrary: two maps of equal structure may be rotated against each other.
    """
    centred, target = xy_N2 - xy_N2.mean(0), to_N2 - to_N2.mean(0)
    return centred @ orthogonal_procrustes(centred, target)[0] + to_N2.mean(0)


def centroids(values_ND: Floats, kinds_N: Names, kinds: Names) -> Floats:
    """Mean of each kind's rows (T, D)."""
    return np.stack([values_ND[kinds_N == kind].mean(0) for kind in kinds])


def profiles(vectors_ND: Floats, kinds_N: Names, kinds: Names) -> Floats:
    """Cosine distances between the centroids of kinds (T, T), in the space itself."""
    unit_TD = simple_classifiers.unit(centroids(vectors_ND.astype(np.float64), kinds_N, kinds))
    return 1 - unit_TD @ unit_TD.T


def agreement(first_TT: Floats, second_TT: Floats) -> Floats:
    """For each kind, the correlation (Pearson) of its distances to all others in two spaces; NaN with fewer than three others."""
    number = len(first_TT)
    out = np.full(number, NONE)
    for i in range(number) if number > 3 else ():
        others = np.arange(number) != i
        out[i] = np.corrcoef(first_TT[i, others], second_TT[i, others])[0, 1]
    return out


def corresponding(vectors_ND: Floats, xy_N2: Floats, types_N: Names, species_N: Names) -> pd.DataFrame:
    """Distances of the centroids of one type in two species, in a space (cosine distance) and in its map (map units).

    Returns:
        A row per type that both species have and ordered pair of species: species, other_species, type, num_cells, num_other,
        `distance` and `map_distance` of the two centroids, `nearest` (the other species' type whose centroid is nearest in the
        space), `place` of the type's own counterpart (1 = it is the nearest) among `num_types` of the other species.
    """
    kinds_N = np.char.add(np.char.add(species_N, "\x1f"), types_N)
    kinds, counts = np.unique(kinds_N, return_counts=True)
    kinds, counts = kinds[counts >= MIN_CELLS], counts[counts >= MIN_CELLS]
    names = [tuple(kind.split("\x1f")) for kind in kinds.tolist()]
    away = (
        cdist(*[centroids(vectors_ND.astype(np.float64), kinds_N, kinds)] * 2, metric="cosine")
        if len(kinds)
        else np.empty((0, 0))
    )
    drawn = cdist(*[centroids(xy_N2, kinds_N, kinds)] * 2) if len(kinds) else away
    rows = []
    for i, (one, kind) in enumerate(names):
        for j, (other, same) in enumerate(names):
            if one == other or kind != same:
                continue
            others = np.array([k for k, (s, _) in enumerate(names) if s == other])
            rows.append({
                "species": one, "other_species": other, "type": kind, "num_cells": int(counts[i]), "num_other": int(counts[j]),
                "distance": float(away[i, j]), "map_distance": float(drawn[i, j]), "nearest": names[others[away[i, others].argmin()]][1],
                "place": 1 + int((away[i, others] < away[i, j]).sum()), "num_types": len(others),
            })  # fmt: skip
    columns = [
        "species",
        "other_species",
        "type",
        "num_cells",
        "num_other",
        "distance",
        "map_distance",
        "nearest",
        "place",
        "num_types",
    ]
    return pd.DataFrame(rows, columns=columns)
