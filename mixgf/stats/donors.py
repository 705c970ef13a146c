"""Tests and intervals for effects measured on cells of several donors, over all genes at once.

Input is flat: `values_P`, with the group (gene) and the cluster (donor) of each value. Everything is vectorised over
groups, so that 20,000 genes take seconds.

Letters: P values, G groups (genes), C clusters (donors), R sign patterns.
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
    """Means of groups with their intervals, all of shape (G,); NaN where a group has no values, or too few for an interval."""

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
    """Two-sided Wilcoxon rank-sum test of every group against pooled values; z and p, each of shape (G,).

    The test treats values as independent: with many cells of few donors, p mostly reflects the number of cells.

    Args:
        values_P: finite values.
        group_P: group of each value, 0 to G - 1.
        num_groups: G.
        among_G: groups whose values make the pool; None = all.
        include_self: False: the pool leaves out the tested group; equal to
            `scipy.stats.mannwhitneyu(method="asymptotic", use_continuity=False)`. True: the pool contains it, as in the
            published statistics; equal to `scipy.stats.ranksums(group, pool)`, which never corrects for ties.
        correct_ties: False: no correction for ties, equal to `scipy.stats.ranksums`.

    Returns:
        NaN for groups without values, or without values to compare with.
    """
    assert np.isfinite(values_P).all(), "rank_sums: values must be finite"
    pooled_G = np.ones(num_groups, dtype=bool) if among_G is None else among_G
    pool = np.sort(values_P[pooled_G[group_P]])
    size_G: Float64s = np.bincount(group_P, minlength=num_groups).astype(np.float64)
    # U of a group against the whole pool: sum of (values below + half of the equal ones), its own values included
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
    """Tie term of the variance, (G,): sum of t^3 - t, where t counts each distinct value in the pool and the group."""
    code_P = np.unique(values_P, return_inverse=True)[1].astype(np.int64)
    size = int(code_P.max(initial=0)) + 1
    num_V = np.bincount(code_P[pooled_G[group_P]], minlength=size).astype(np.float64)
    ties_G = np.full(len(pooled_G), float((num_V**3 - num_V).sum()))
    outside_P = ~pooled_G[group_P]  # the values of these groups add to those of the pool
    key, own = np.unique(group_P[outside_P] * size + code_P[outside_P], return_counts=True)
    pooled, both = num_V[key % size], num_V[key % size] + own
    np.add.at(ties_G, key // size, (both**3 - both) - (pooled**3 - pooled))
    return ties_G


def benjamini_hochberg(p_G: Float64s, num_tests: int = 0) -> Float64s:
    """False discovery rates (Benjamini and Hochberg 1995), (G,).

    Args:
        p_G: p-values; NaN = not tested, gets NaN and does not count.
        num_tests: number of tests, where `p_G` holds only the smallest p-values; the others count as p = 1.
    """
    tested_G = np.isfinite(p_G)
    missing = max(0, num_tests - int(tested_G.sum()))
    fdr_G = np.full(len(p_G), np.nan)
    fdr = stats.false_discovery_control(np.concatenate([p_G[tested_G], np.ones(missing)]))
    fdr_G[tested_G] = fdr[: len(fdr) - missing]
    return fdr_G


def holm(p_T: Float64s) -> Float64s:
    """p-values corrected for the number of tests (Holm 1979), (T,): the chance of any false finding is bounded. NaN = not tested."""
    out_T = np.full(len(p_T), np.nan)
    tested = np.flatnonzero(np.isfinite(p_T))
    order = tested[np.argsort(p_T[tested], kind="stable")]
    factor = np.arange(len(order), 0, -1)
    out_T[order] = np.minimum(1.0, np.maximum.accumulate(p_T[order] * factor))
    return out_T


def cluster_means(
    values_P: Float64s, group_P: Ints, cluster_P: Ints, num_groups: int, num_clusters: int
) -> tuple[Float64s, Ints]:
    """Mean and number of the values of every (group, cluster), each (G, C); the mean of no values is NaN."""
    pair_P = group_P * num_clusters + cluster_P
    size = num_groups * num_clusters
    num = np.bincount(pair_P, minlength=size).reshape(num_groups, num_clusters)
    total = np.bincount(pair_P, weights=values_P, minlength=size).reshape(num_groups, num_clusters)
    with np.errstate(invalid="ignore"):
        return total / num, num


def means_by_group(values_P: NDArray[np.floating[Any]], group_P: Ints, num_groups: int) -> Float64s:
    """Mean of each group's values, (G,); NaN where it has none."""
    with np.errstate(invalid="ignore"):
        return np.bincount(group_P, weights=values_P, minlength=num_groups) / np.bincount(group_P, minlength=num_groups)


def group_means(
    values_P: Float64s, group_P: Ints, cluster_P: Ints, num_groups: int, num_clusters: int, *, confidence: float = 0.95
) -> GroupMeans:
    """Means over all values of each group, with t intervals that account for clusters (donors).

    With at least `MIN_CLUSTERS` clusters the standard error is cluster-robust (CR1: squared sums of residuals by cluster,
    times C / (C - 1)), with C - 1 degrees of freedom. One value per cluster then gives the ordinary t interval.
    With fewer clusters every value counts as its own cluster: the interval does not hold for other donors.
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


def subtract_background(mean_GC: Float64s, among_G: Bools | None = None) -> Float64s:
    """Cluster means minus the mean of all *other* groups in the same cluster, (G, C).

    A perturbation of any gene moves the cells of a donor somewhat; the difference is the gene's own part.

    Args:
        mean_GC: mean of each group in each cluster; NaN = not measured.
        among_G: groups that make the background; None = all.

    Returns:
        NaN where fewer than `MIN_BACKGROUND` other groups were measured in the cluster.
    """
    measured_GC = np.isfinite(mean_GC) & (np.ones(len(mean_GC), dtype=bool) if among_G is None else among_G)[:, None]
    others_GC = measured_GC.sum(axis=0, keepdims=True) - measured_GC
    value_GC = np.where(measured_GC, mean_GC, 0.0)
    with np.errstate(invalid="ignore"):
        background_GC = (value_GC.sum(axis=0, keepdims=True) - value_GC) / others_GC
    return np.where(others_GC >= MIN_BACKGROUND, mean_GC - background_GC, np.nan)


def sign_flip(mean_GC: Float64s, num_permutations: int, rng: np.random.Generator) -> Float64s:
    """Two-sided sign-flip test that the cluster means of each group are symmetric about 0; p-values (G,).

    The test is exact where all 2**C sign patterns are at most `num_permutations`. Otherwise it draws `num_permutations`
    patterns, and p = (1 + number as extreme) / (1 + number drawn). The smallest possible p is 2 / 2**C: 0.25 with 3
    donors, 0.03 with 6. NaN for groups measured in fewer than `MIN_CLUSTERS` clusters.
    """
    num_groups, num_clusters = mean_GC.shape
    exact = num_clusters < 63 and 2**num_clusters <= num_permutations
    if exact:
        bits = np.arange(2**num_clusters)[:, None] >> np.arange(num_clusters) & 1
        signs_RC = 1.0 - 2.0 * bits
    else:
        signs_RC = rng.choice(np.array([-1.0, 1.0]), size=(num_permutations, num_clusters))
    measured_GC = np.isfinite(mean_GC)
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
    return np.where(measured_GC.sum(axis=1) >= MIN_CLUSTERS, p_G, np.nan)


def sign_flip_power(num_clusters: int, effect: float, *, level: float = 0.05, num_draws: int = 2000) -> float:
    """Power of the sign-flip test, by simulation with a fixed seed: share of genes with p at most `level`.

    Args:
        num_clusters: donors.
        effect: the gene's true effect, in standard deviations of the donors' (normal) means.
        level: significance level, before any correction for many genes.
        num_draws: simulated genes.
    """
    if num_clusters < MIN_CLUSTERS or smallest_p(num_clusters) > level:
        return 0.0
    rng = np.random.default_rng([num_clusters, 93])
    mean_GC = effect + rng.standard_normal((num_draws, num_clusters))
    return float((sign_flip(mean_GC, 1 << 10, rng) <= level).mean())


def smallest_detectable_effect(num_clusters: int, *, level: float = 0.05, wanted: float = 0.8) -> float:
    """Smallest effect, in standard deviations of donors' means, that the test finds with power `wanted`; inf if none."""
    low, high = 0.0, 8.0
    if sign_flip_power(num_clusters, high, level=level) < wanted:
        return float("inf")
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (low, middle) if sign_flip_power(num_clusters, middle, level=level) >= wanted else (middle, high)
    return high


def smallest_p(num_clusters: int) -> float:
    """Smallest two-sided p that a sign-flip test over `num_clusters` clusters can give."""
    return min(1.0, 2.0 ** (1 - num_clusters)) if num_clusters > 0 else 1.0


def attainable_level(num_clusters: int, level: float = 0.05) -> float:
    """True size of an exact sign-flip test at `level`: its p-values are discrete, so this is at most `level`."""
    return np.floor(level / smallest_p(num_clusters) + 1e-9) * smallest_p(num_clusters)


def fewest_discoveries(smallest: float, num_tests: int, *, level: float = 0.05) -> int:
    """Fewest tests with the smallest possible p, `smallest`, that can pass Benjamini-Hochberg at `level` together."""
    return max(1, int(np.ceil(smallest * num_tests / level - 1e-9)))


def spearman(a_G: Float64s, b_G: Float64s) -> float:
    """Spearman correlation over the groups with both values; NaN with fewer than five, or where one side is constant."""
    both_G = np.isfinite(a_G) & np.isfinite(b_G)
    if both_G.sum() < 5:
        return float("nan")
    a, b = (ranks - ranks.mean() for ranks in (stats.rankdata(a_G[both_G]), stats.rankdata(b_G[both_G])))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


def welch(num_2G: Float64s, mean_2G: Float64s, variance_2G: Float64s) -> Float64s:
    """Welch's t of the second row against the first, (G,), from sizes, means and unbiased variances, each (2, G).

    NaN where a side has fewer than 2 values; infinite where both sides are constant and differ.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        error_G = np.sqrt((variance_2G / num_2G).sum(axis=0))
        difference_G = mean_2G[1] - mean_2G[0]
        t_G = np.where(difference_G == 0, 0.0, difference_G / error_G)
    return np.where(num_2G.min(axis=0) >= 2, t_G, np.nan)
