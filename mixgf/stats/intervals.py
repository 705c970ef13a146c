"""95 % intervals: Wilson for proportions, DeLong for AUROC; for other scores a jackknife over donors, or a bootstrap over cells.

Donors are what differs between studies, so a score of several donors has an interval over donors: Student's t on the
delete-one-donor jackknife (Efron and Tibshirani 1993, section 11.5). With fewer than `MIN_DONORS` donors there is none. A
percentile bootstrap of 4 to 9 donors covers 78 to 91 % instead of 95 %. Cells have an interval of their own only where
no donor is named, or all cells are of one.

Letters: M cells, E distinct entries (for example pairs of true and predicted label), K clusters, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray
from scipy import sparse, special
from scipy import stats as scipy_stats

from mixgf.arrays import Float64s, Ints

NUM_RESAMPLES = 1000
MIN_DONORS = 4
"""Fewest donors for an interval over donors."""
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
    above_M, below_N = _placements(score_G, positive_G)
    found = _delong(above_M, below_N, confidence)
    return (
        Interval(value=found.value, low=max(0.0, found.low), high=min(1.0, found.high))
        if np.isfinite(found.low)
        else found
    )


def auroc_difference(
    one_G: NDArray[np.float64], other_G: NDArray[np.float64], positive_G: NDArray[np.bool_], *, confidence: float = 0.95
) -> Interval:
    """Difference of the areas under the ROC curves of two scores of the same genes, with DeLong's paired interval.

    Arguments and NaN as in `auroc`.
    """
    sides = [_placements(score_G, positive_G) for score_G in (one_G, other_G)]
    return _delong(sides[0][0] - sides[1][0], sides[0][1] - sides[1][1], confidence)


def _placements(score_G: NDArray[np.float64], positive_G: NDArray[np.bool_]) -> tuple[Float64s, Float64s]:
    """Share of negatives below each positive, and of positives above each negative; equal scores count half."""
    positive, negative = score_G[positive_G], score_G[~positive_G]
    m, n = len(positive), len(negative)
    if m == 0 or n == 0:
        return np.full(m, np.nan), np.full(n, np.nan)
    ranks = scipy_stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - scipy_stats.rankdata(positive)) / n
    below = 1 - (ranks[m:] - scipy_stats.rankdata(negative)) / m
    return above, below


def _delong(above_M: Float64s, below_N: Float64s, confidence: float) -> Interval:
    """Mean of the placements, with the interval of DeLong et al. (1988)."""
    m, n = len(above_M), len(below_N)
    value = float(above_M.mean()) if m and n else float("nan")
    if m < 2 or n < 2:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    half = float(special.ndtri(0.5 + confidence / 2)) * float(
        np.sqrt(above_M.var(ddof=1) / m + below_N.var(ddof=1) / n)
    )
    return Interval(value=value, low=value - half, high=value + half)


def interval_units(donors_M: npt.NDArray[np.str_], *, held_out: bool = False) -> tuple[Ints, str]:
    """What an interval is taken over.

    Args:
        donors_M: donor of each cell.
        held_out: the cells are those of held-out donors, so that an interval over cells would not hold for other donors.

    Returns:
        The unit's number for every cell (M,), and its name: `donor`; `cell` where all cells have the same donor; or `none`
        where there are too few donors for an interval.
    """
    donors, donor_M = np.unique(donors_M, return_inverse=True)
    if len(donors) == 1 and not held_out:
        return np.arange(len(donors_M), dtype=np.int64), "cell"
    return donor_M.astype(np.int64), "donor" if len(donors) >= MIN_DONORS else "none"


def leave_one_out_counts(clusters_M: Ints, entries_M: Ints, num_entries: int) -> tuple[Ints, Ints]:
    """Counts of each entry without one cluster, (K, E), and cells of each cluster, (K,). Arguments as `bootstrap_counts`."""
    num_clusters = int(clusters_M.max()) + 1
    flat = np.bincount(clusters_M * num_entries + entries_M, minlength=num_clusters * num_entries)
    own_KE = flat.reshape(num_clusters, num_entries).astype(np.int64)
    return own_KE.sum(0) - own_KE, own_KE.sum(1)


def jackknife_interval(
    value: float, left_out_K: Float64s, sizes_K: Ints, *, bounded: bool = False
) -> tuple[Interval, float]:
    """Interval of a score over K donors (`LEVEL`), and the two-sided p that the score is 0.

    Student's t with (sum n)^2 / sum n^2 - 1 degrees of freedom, where n are the donors' cells: few large donors count as few.

    Args:
        value: the score of all donors.
        left_out_K: the score without each donor.
        sizes_K: cells of each donor.
        bounded: the score lies in [0, 1]. The interval is then taken on the logit scale, and p is NaN. If no donor changes
            the score, the interval is Wilson's over cells.
    """
    num, total = len(left_out_K), int(sizes_K.sum())
    freedom = max(1.0, total**2 / float((sizes_K.astype(np.float64) ** 2).sum()) - 1)
    edge = 0.5 / (total + 1)

    def scaled(x: Any) -> Any:
        return special.logit(np.clip(x, edge, 1 - edge)) if bounded else x

    error = float(np.sqrt((num - 1) / num * ((scaled(left_out_K) - scaled(value)) ** 2).sum()))
    if bounded and error == 0:
        found = wilson(round(value * total), total, confidence=LEVEL)
        return Interval(value, min(value, found.low), max(value, found.high)), float("nan")
    half = float(scipy_stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    if bounded:
        low, high = (float(special.expit(scaled(value) + sign * half)) for sign in (-1, 1))
        return Interval(value, min(value, low), max(value, high)), float("nan")
    p = float(2 * scipy_stats.t.sf(abs(value) / error, freedom)) if error > 0 else float(value == 0)
    return Interval(value, value - half, value + half), p


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
