"""Whether a type's cells lie further apart in one model than in another: dispersion and local density (Figures 2 and 3 of the paper).

The paper states by eye that clusters are no more dispersed in its joint model than in a model of one species. It also states that
the local density is preserved. Here both models see the same cells. For each cell, in the map and in the space itself:

- dispersion: distance to the centroid of its type;
- local radius: mean distance to its `NEIGHBOURS` nearest cells of any type, the reciprocal of local density
  (as in densMAP, Narayan et al. 2021).

Units of maps and spaces are arbitrary, so logarithms are taken, and the mean over all cells of the space is subtracted. The
difference between two models is paired by cell. Its interval is over donors (t, cluster-robust), or over cells where all are of
one donor.

Letters: N cells, D width of a space (2 for a map), T types.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from mixgf.arrays import Float64s, Floats, Ints, Names
from mixgf.classification.embedding_measures import MIN_CELLS, centroids
from mixgf.classification.simple_classifiers import unit
from mixgf.stats import donors
from mixgf.stats.intervals import Interval, interval_units, jackknife_interval

NEIGHBOURS = 15
"""Neighbours of the local radius; fewer where there are fewer cells."""
COLUMNS = (
    "species", "type", "num_cells", "on", "dispersion", "dispersion_low", "dispersion_high", "radius", "radius_low", "radius_high",
    "density_correlation", "density_correlation_low", "density_correlation_high", "interval_by",
)  # fmt: skip


def compare(
    own: dict[str, Floats], other: dict[str, Floats], species_N: Names, types_N: Names, donors_N: Names
) -> pd.DataFrame:
    """Dispersion and local radius of each type in one model, relative to another model of the same cells.

    Args:
        own: coordinates (N, D) by name, `map` and `space`; cells of a space are scaled to length 1.
        other: the same cells in the other model.
        species_N: species of each cell.
        types_N: type of each cell.
        donors_N: donor of each cell.

    Returns:
        A row per species, type with at least `MIN_CELLS` cells, and name. `dispersion` and `radius` are ratios, own over other:
        above 1, the type's cells lie further apart in the own model. `density_correlation` is Spearman's, over the type's cells, of
        the local radii in both models: 1 = the same cells lie in dense places. Ends of intervals are NaN with too few donors.
    """
    kinds_N = np.char.add(np.char.add(species_N, "\x1f"), types_N)
    kinds, kind_N, num_T = np.unique(kinds_N, return_inverse=True, return_counts=True)
    frames = []
    for on in own:
        ours, theirs = (_log_distances(np.asarray(one[on]), kinds_N, kinds, on) for one in (own, other))
        rows = []
        for t in np.flatnonzero(num_T >= MIN_CELLS).tolist():
            mine = kind_N == t
            units, by = interval_units(donors_N[mine])
            found = [_ratio((a - b)[mine], units, by) for a, b in zip(ours, theirs, strict=True)]
            found.append(_correlation(ours[1][mine], theirs[1][mine], units, by))
            numbers = [x for one in found for x in (one.value, one.low, one.high)]
            rows.append([*kinds[t].split("\x1f"), int(num_T[t]), on, *numbers, by])
        frames.append(pd.DataFrame(rows, columns=list(COLUMNS)))
    return pd.concat(frames, ignore_index=True)


def _log_distances(values_ND: Floats, kinds_N: Names, kinds: Names, on: str) -> tuple[Float64s, Float64s]:
    """Logarithm of each cell's distance to its type's centroid and of its local radius, each (N,), less the mean of all cells."""
    at_ND: Floats = values_ND.astype(np.float64)
    if on == "space":
        at_ND = unit(at_ND)
    centre_ND = centroids(at_ND, kinds_N, kinds)[np.searchsorted(kinds, kinds_N)]
    few = min(NEIGHBOURS, len(at_ND) - 1)
    near_NK = NearestNeighbors(n_neighbors=few).fit(at_ND).kneighbors()[0]  # without the cell itself
    both = np.linalg.norm(at_ND - centre_ND, axis=1), near_NK.mean(1)
    logs = [np.log(np.maximum(one, 1e-12)) for one in both]
    return logs[0] - logs[0].mean(), logs[1] - logs[1].mean()


def _ratio(difference_M: Float64s, units_M: Ints, by: str) -> Interval:
    """Exponential of the mean difference of logarithms."""
    group_M = np.zeros(len(difference_M), dtype=np.int64)
    mean = donors.group_means(difference_M, group_M, units_M, 1, int(units_M.max()) + 1)
    low, high = (mean.low[0], mean.high[0]) if by != "none" else (np.nan, np.nan)
    return Interval(*(float(np.exp(x)) for x in (mean.mean[0], low, high)))


def _correlation(first_M: Float64s, second_M: Float64s, units_M: Ints, by: str) -> Interval:
    """Spearman's correlation, with a jackknife over donors or cells."""
    value = donors.spearman(first_M, second_M)
    sizes = np.bincount(units_M)
    if by == "none" or not np.isfinite(value):
        return Interval(value, np.nan, np.nan)
    left_out = np.array([donors.spearman(first_M[units_M != k], second_M[units_M != k]) for k in range(len(sizes))])
    found, _ = jackknife_interval(value, left_out, sizes)
    return Interval(value, max(-1.0, found.low), min(1.0, found.high))
