"""Wilson, DeLong, cluster bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray
from scipy import sparse, special
from scipy import stats as scipy_stats

from mixgf.arrays import Float64s, Ints

# how well a list is found


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Estimate:
    """A proportion with its Wilson score interval; NaN without trials."""
    if trials == 0:
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
    interval = scipy_stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Estimate(value=successes / trials, low=float(interval.low), high=float(interval.high))


def auroc(score_G: NDArray[np.float64], known_G: NDArray[np.bool_], *, confidence: float = 0.95) -> Estimate:
    """Area under the ROC curve of the scores for known against other genes, with DeLong's interval, cut to 0..1."""
    positive, negative = score_G[known_G], score_G[~known_G]
    m, n = len(positive), len(negative)
    if m == 0 or n == 0:
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
    ranks = scipy_stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - scipy_stats.rankdata(positive)) / n  # share of negatives below each positive
    below = 1 - (ranks[m:] - scipy_stats.rankdata(negative)) / m
    value = float(above.mean())
    if m < 2 or n < 2:
        return Estimate(value=value, low=float("nan"), high=float("nan"))
    half = float(special.ndtri(0.5 + confidence / 2)) * float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
    return Estimate(value=value, low=max(0.0, value - half), high=min(1.0, value + half))


NUM_RESAMPLES = 1000
MIN_DONORS = 3
"""Intervals are clustered by donor from this many donors on; with fewer, over cells."""
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


def clusters(donors_M: npt.NDArray[np.str_]) -> tuple[Ints, str]:
    """The unit that a bootstrap draws, as one number per cell: its donor from `MIN_DONORS` donors on, else the cell."""
    donors, donor_M = np.unique(donors_M, return_inverse=True)
    if len(donors) >= MIN_DONORS:
        return donor_M.astype(np.int64), "donor"
    return np.arange(len(donors_M), dtype=np.int64), "cell"


def resample(clusters_M: Ints, entries_M: Ints, num_entries: int, *, rng: np.random.Generator,
             num_resamples: int = NUM_RESAMPLES) -> Ints:  # fmt: skip
    """Cluster bootstrap: counts (R, E) of each entry when K clusters are drawn K times with replacement.

    Clusters with the same entries are drawn as one multinomial category, which is the same law and far cheaper.

    Args:
        clusters_M: Cluster of each row, 0 to K - 1.
        entries_M: Entry of each row, 0 to E - 1.
        num_entries: E.
        rng: Draws.
        num_resamples: R.
    """
    num_clusters = int(clusters_M.max()) + 1
    order = np.lexsort((entries_M, clusters_M))
    starts = np.searchsorted(clusters_M[order], np.arange(num_clusters + 1))
    sorted_entries = entries_M[order].astype(np.int64)
    multiplicity: dict[bytes, int] = {}
    for start, stop in pairwise(starts.tolist()):
        pattern = sorted_entries[start:stop].tobytes()
        multiplicity[pattern] = multiplicity.get(pattern, 0) + 1
    patterns = [np.frombuffer(pattern, dtype=np.int64) for pattern in sorted(multiplicity)]
    weights = np.array([multiplicity[pattern] for pattern in sorted(multiplicity)], dtype=np.float64)
    drawn = rng.multinomial(num_clusters, weights / weights.sum(), size=num_resamples)
    rows = np.repeat(np.arange(len(patterns)), [len(pattern) for pattern in patterns])
    columns = np.concatenate(patterns)
    contents = sparse.csr_matrix(
        (np.ones(len(rows), dtype=np.int64), (rows, columns)), shape=(len(patterns), num_entries)
    )
    return np.asarray((contents.T @ drawn.T).T, dtype=np.int64)


def _interval(value: float, drawn_R: Float64s) -> Interval:
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
