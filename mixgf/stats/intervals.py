"""95 % intervals: Wilson for proportions, DeLong for AUROC, bootstrap over donors for everything else.

Letters: M cells, E distinct entries (for example pairs of true and predicted label), K clusters, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray
from scipy import sparse, special
from scipy import stats as scipy_stats

from mixgf.arrays import Float64s, Ints

NUM_RESAMPLES = 1000
MIN_DONORS = 3
"""Fewest donors for a bootstrap over donors; with fewer, the bootstrap draws cells."""
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Proportion with its Wilson score interval; NaN without trials."""
    if trials == 0:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    interval = scipy_stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(value=successes / trials, low=float(interval.low), high=float(interval.high))


def auroc(score_G: NDArray[np.float64], positive_G: NDArray[np.bool_], *, confidence: float = 0.95) -> Interval:
    """Area under the ROC curve with DeLong's interval, clipped to [0, 1].

    Args:
        score_G: one score per gene; positives should have higher ones.
        positive_G: which genes are positives.
        confidence: of the interval.

    Returns:
        NaN value without positives or without negatives; NaN limits with only one of either.
    """
    positive, negative = score_G[positive_G], score_G[~positive_G]
    m, n = len(positive), len(negative)
    if m == 0 or n == 0:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    ranks = scipy_stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - scipy_stats.rankdata(positive)) / n  # share of negatives below each positive
    below = 1 - (ranks[m:] - scipy_stats.rankdata(negative)) / m
    value = float(above.mean())
    if m < 2 or n < 2:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    half = float(special.ndtri(0.5 + confidence / 2)) * float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
    return Interval(value=value, low=max(0.0, value - half), high=min(1.0, value + half))


def bootstrap_units(donors_M: npt.NDArray[np.str_]) -> tuple[Ints, str]:
    """What the bootstrap draws: donors, or single cells where there are fewer than `MIN_DONORS` donors.

    Returns:
        The unit's number for every cell (M,), and its name: `donor` or `cell`.
    """
    donors, donor_M = np.unique(donors_M, return_inverse=True)
    if len(donors) >= MIN_DONORS:
        return donor_M.astype(np.int64), "donor"
    return np.arange(len(donors_M), dtype=np.int64), "cell"


def bootstrap_counts(clusters_M: Ints, entries_M: Ints, num_entries: int, *, rng: np.random.Generator,
             num_resamples: int = NUM_RESAMPLES) -> Ints:  # fmt: skip
    """Cluster bootstrap: counts (R, E) of each entry when K clusters are drawn K times with replacement.

    Clusters with the same entries are drawn as one multinomial category: the distribution is the same, the cost lower.

    Args:
        clusters_M: Cluster of each cell, 0 to K - 1.
        entries_M: Entry of each cell, 0 to E - 1.
        num_entries: E.
        rng: Source of the draws.
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


def percentile_interval(value: float, drawn_R: Float64s) -> Interval:
    """Interval with the percentile interval (`LEVEL`) of its R bootstrap values."""
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
