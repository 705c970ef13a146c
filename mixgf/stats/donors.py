"""Tests, intervals and nulls for effects measured on cells of several donors. Numpy and scipy only.

Values come flat: `values_P` with the group (gene) and the cluster (donor) of each. Letters: P values, G groups,
C clusters, F features, R permutations. Everything is vectorised over groups, so that 20,000 genes take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from mixgf.arrays import Bools, Float64s, Ints

MIN_CLUSTERS = 3
"""Fewest donors for which a donor-level p-value is given."""
MIN_BACKGROUND = 10
"""Fewest other genes that make a background."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMeans:
    """Means of groups with intervals, all of shape (G,); NaN where a group has no values (or no spread to judge)."""

    mean: Float64s
    low: Float64s
    high: Float64s
    num_values: Ints
    num_clusters: Ints


def rank_sums(
    values_P: Float64s,
    group_P: Ints,
    num_groups: int,
    *,
    among_G: Bools | None = None,
    include_self: bool = False,
    correct_ties: bool = True,
) -> tuple[Float64s, Float64s]:
    """Two-sided Wilcoxon rank-sum test of every group against the pooled values, z and p of shape (G,).

    Default: against the values of all *other* groups, equal to scipy's `mannwhitneyu(asymptotic, use_continuity=False)`
    (to `ranksums` with `correct_ties=False`). `include_self` tests against the whole pool, the group itself included, as
    the published statistics do; that equals `scipy.stats.ranksums(group, pool)`, which never corrects for ties. `among_G`
    says whose values make the pool; None = everybody's.
    The values are treated as independent: with cells of few donors p mostly tells how many cells there are.
    """
    assert np.isfinite(values_P).all(), "rank_sums: values must be finite"
    pooled_G = np.ones(num_groups, dtype=bool) if among_G is None else among_G
    pool = np.sort(values_P[pooled_G[group_P]])
    size_G: Float64s = np.bincount(group_P, minlength=num_groups).astype(np.float64)
    # U of a group against the whole pool: sum of (values below + half of the equal ones), itself included where it is there
    below_P = (np.searchsorted(pool, values_P, "left") + np.searchsorted(pool, values_P, "right")) / 2
    u_G: Float64s = np.bincount(group_P, weights=below_P, minlength=num_groups).astype(np.float64)
    other_G: Float64s = np.full(num_groups, float(len(pool)))
    ties_G = np.zeros(num_groups)
    if not include_self:
        u_G = u_G - np.where(pooled_G, size_G**2 / 2, 0)  # comparisons of a group with itself
        other_G = other_G - np.where(pooled_G, size_G, 0)
        if correct_ties:
            ties_G = _ties(values_P, group_P, pooled_G)
    all_G = other_G + size_G
    with np.errstate(invalid="ignore", divide="ignore"):
        variance_G = size_G * other_G / 12 * (all_G + 1 - ties_G / (all_G * (all_G - 1)))
        z_G = np.where(variance_G > 0, (u_G - size_G * other_G / 2) / np.sqrt(variance_G), 0.0)
    empty_G = (size_G == 0) | (other_G == 0)
    z_G = np.where(empty_G, np.nan, z_G)
    return z_G, 2 * special.ndtr(-np.abs(z_G))


def _ties(values_P: Float64s, group_P: Ints, pooled_G: Bools) -> Float64s:
    """Sum of t^3 - t over the values that the pool and a group hold t times together, (G,)."""
    code_P = np.unique(values_P, return_inverse=True)[1].astype(np.int64)
    size = int(code_P.max(initial=0)) + 1
    num_V = np.bincount(code_P[pooled_G[group_P]], minlength=size).astype(np.float64)
    ties_G = np.full(len(pooled_G), float((num_V**3 - num_V).sum()))
    outside_P = ~pooled_G[group_P]  # their values come on top of the pool's
    key, own = np.unique(group_P[outside_P] * size + code_P[outside_P], return_counts=True)
    there, both = num_V[key % size], num_V[key % size] + own
    np.add.at(ties_G, key // size, (both**3 - both) - (there**3 - there))
    return ties_G


def benjamini_hochberg(p_G: Float64s, num_tests: int = 0) -> Float64s:
    """False discovery rates; tests without a p-value (NaN) are not counted and stay NaN.

    `num_tests` says how many tests there were where only the most promising are given: the others count as failed.
    """
    fdr_G = np.full(len(p_G), np.nan)
    tested = np.flatnonzero(np.isfinite(p_G))
    if len(tested):
        order = tested[np.argsort(p_G[tested], kind="stable")]
        scaled = p_G[order] * max(len(order), num_tests) / np.arange(1, len(order) + 1)
        fdr_G[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return fdr_G


def cluster_means(
    values_P: Float64s, group_P: Ints, cluster_P: Ints, num_groups: int, num_clusters: int
) -> tuple[Float64s, Ints]:
    """Mean and number of the values of every (group, cluster), each (G, C); NaN where there are none."""
    cell_P = group_P * num_clusters + cluster_P
    size = num_groups * num_clusters
    num = np.bincount(cell_P, minlength=size).reshape(num_groups, num_clusters)
    total = np.bincount(cell_P, weights=values_P, minlength=size).reshape(num_groups, num_clusters)
    with np.errstate(invalid="ignore"):
        return np.where(num > 0, total / num, np.nan), num


def mean_by(values_P: NDArray[np.floating[Any]], group_P: Ints, num_groups: int) -> Float64s:
    """Mean of each group's values, (G,); NaN where it has none."""
    with np.errstate(invalid="ignore"):
        return np.bincount(group_P, weights=values_P, minlength=num_groups) / np.bincount(group_P, minlength=num_groups)


def group_means(
    values_P: Float64s, group_P: Ints, cluster_P: Ints, num_groups: int, num_clusters: int, *, confidence: float = 0.95
) -> GroupMeans:
    """Means over all values of a group with t intervals that respect clusters (donors).

    With at least `MIN_CLUSTERS` clusters the standard error is the cluster-robust one (CR1: sums of residuals by
    cluster, times C / (C - 1)) with C - 1 degrees of freedom; one value per cluster gives the ordinary t interval.
    With fewer, every value is a cluster of its own, and the interval tells nothing about other donors.
    """
    num_G = np.bincount(group_P, minlength=num_groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_G = np.bincount(group_P, weights=values_P, minlength=num_groups) / num_G
        residual_P = values_P - mean_G[group_P]
        mean_GC, num_GC = cluster_means(residual_P, group_P, cluster_P, num_groups, num_clusters)
        clusters_G = (num_GC > 0).sum(axis=1)
        by_cluster_G = (np.nan_to_num(mean_GC * num_GC) ** 2).sum(axis=1)
        by_value_G = np.bincount(group_P, weights=residual_P**2, minlength=num_groups)
        clustered_G = clusters_G >= MIN_CLUSTERS
        units_G = np.where(clustered_G, clusters_G, num_G).astype(np.float64)
        squares_G = np.where(clustered_G, by_cluster_G, by_value_G)
        error_G = np.sqrt(squares_G * units_G / (units_G - 1)) / num_G
        half_G = stats.t.ppf(0.5 + confidence / 2, np.maximum(units_G - 1, 1)) * error_G
    half_G = np.where(units_G > 1, half_G, np.nan)
    return GroupMeans(mean=mean_G, low=mean_G - half_G, high=mean_G + half_G, num_values=num_G, num_clusters=clusters_G)


def less_background(mean_GC: Float64s, among_G: Bools | None = None) -> Float64s:
    """Cluster means less what the *other* groups have on average in the same cluster, (G, C).

    Few things happen to one gene alone: a perturbation of any gene moves the cells of a donor somewhat. What is left is
    the gene's own part. NaN where fewer than `MIN_BACKGROUND` other groups (of `among_G`; None = all) were measured there.
    """
    known_GC = np.isfinite(mean_GC) & (np.ones(len(mean_GC), dtype=bool) if among_G is None else among_G)[:, None]
    others_GC = known_GC.sum(axis=0, keepdims=True) - known_GC
    value_GC = np.where(known_GC, mean_GC, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        background_GC = (value_GC.sum(axis=0, keepdims=True) - value_GC) / others_GC
    return np.where(others_GC >= MIN_BACKGROUND, mean_GC - background_GC, np.nan)


def sign_flip(mean_GC: Float64s, num_permutations: int, rng: np.random.Generator) -> Float64s:
    """Two-sided p-values (G,) that the cluster means are symmetric about 0: their signs are flipped at random.

    All 2**C sign patterns where these are at most `num_permutations` (then exact), else that many random ones and
    p = (1 + as extreme) / (1 + patterns). The smallest possible p is 2 / 2**C: 0.25 with 3 donors, 0.03 with 6.
    NaN for groups seen in fewer than `MIN_CLUSTERS` clusters.
    """
    num_groups, num_clusters = mean_GC.shape
    exact = num_clusters < 63 and 2**num_clusters <= num_permutations
    if exact:
        bits = np.arange(2**num_clusters)[:, None] >> np.arange(num_clusters) & 1
        signs_RC = 1.0 - 2.0 * bits
    else:
        signs_RC = rng.choice(np.array([-1.0, 1.0]), size=(num_permutations, num_clusters))
    known_GC = np.isfinite(mean_GC)
    value_GC = np.nan_to_num(mean_GC)  # an absent cluster adds 0 under every pattern: p stays exact
    p_G = np.full(num_groups, np.nan)
    block = max(1, 20_000_000 // len(signs_RC))
    for start in range(0, num_groups, block):
        part_GC = value_GC[start : start + block]
        observed_G = np.abs(part_GC.sum(axis=1))
        slack_G = 1e-12 * np.abs(part_GC).sum(axis=1)
        flipped_RG = np.abs(signs_RC @ part_GC.T)
        extreme_G = (flipped_RG >= observed_G - slack_G).sum(axis=0)
        p_G[start : start + block] = extreme_G / len(signs_RC) if exact else (1 + extreme_G) / (1 + len(signs_RC))
    return np.where(known_GC.sum(axis=1) >= MIN_CLUSTERS, p_G, np.nan)


def power(num_clusters: int, effect: float, *, level: float = 0.05, num_draws: int = 2000) -> float:
    """Share of genes that the sign-flip test finds (p at most `level`), by simulation with a seed of its own.

    Args:
        num_clusters: donors.
        effect: the gene's effect, in standard deviations of donors' means (normal) about it.
        level: largest p that counts as found, before any correction for many genes.
        num_draws: simulated genes.
    """
    if num_clusters < MIN_CLUSTERS or smallest_p(num_clusters) > level:
        return 0.0
    rng = np.random.default_rng([num_clusters, 93])
    mean_GC = effect + rng.standard_normal((num_draws, num_clusters))
    return float((sign_flip(mean_GC, 1 << 10, rng) <= level).mean())


def detectable(num_clusters: int, *, level: float = 0.05, wanted: float = 0.8) -> float:
    """Smallest effect, in standard deviations of donors' means, that is found with power `wanted`; infinite if none is."""
    low, high = 0.0, 8.0
    if power(num_clusters, high, level=level) < wanted:
        return float("inf")
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (low, middle) if power(num_clusters, middle, level=level) >= wanted else (middle, high)
    return high


def smallest_p(num_clusters: int) -> float:
    """Smallest two-sided p that a sign-flip test over so many clusters can give."""
    return min(1.0, 2.0 ** (1 - num_clusters)) if num_clusters > 0 else 1.0


def attainable(num_clusters: int, level: float = 0.05) -> float:
    """Share of p-values at or below `level` that an exact sign-flip test gives where there is nothing: p has few values."""
    return np.floor(level / smallest_p(num_clusters) + 1e-9) * smallest_p(num_clusters)


def fewest_hits(num_clusters: int, num_tests: int, *, level: float = 0.05) -> int:
    """How many tests must reach the smallest possible p before any can pass Benjamini-Hochberg at `level`."""
    return max(1, int(np.ceil(smallest_p(num_clusters) * num_tests / level - 1e-9)))


def spearman(a_G: Float64s, b_G: Float64s) -> float:
    """Rank correlation over the groups that have both values; NaN with fewer than five of them, or where a side is constant."""
    both_G = np.isfinite(a_G) & np.isfinite(b_G)
    if both_G.sum() < 5:
        return float("nan")
    a, b = (ranks - ranks.mean() for ranks in (stats.rankdata(a_G[both_G]), stats.rankdata(b_G[both_G])))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


def welch(num_2G: Float64s, mean_2G: Float64s, variance_2G: Float64s) -> Float64s:
    """Welch's t of the second row against the first, from numbers, means and unbiased variances of G groups each.

    NaN with fewer than 2 values on a side; infinite where constants differ.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        error_G = np.sqrt((variance_2G / num_2G).sum(axis=0))
        difference_G = mean_2G[1] - mean_2G[0]
        t_G = np.where(difference_G == 0, 0.0, difference_G / error_G)
    return np.where(num_2G.min(axis=0) >= 2, t_G, np.nan)
