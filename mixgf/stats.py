"""Tests, intervals and nulls for effects measured on cells of several donors. Numpy and scipy only.

Values come flat: `values_P` with the group (gene) and the cluster (donor) of each. Letters: P values, G groups,
C clusters, F features, R permutations. Everything is vectorised over groups, so that 20,000 genes take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.spatial import KDTree

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

MIN_CLUSTERS = 3
"""Fewest donors for which a donor-level p-value is given."""
MIN_BACKGROUND = 10
"""Fewest other genes that make a background."""
MAX_WINDOW = 401
"""Most neighbours in one local fit of `expected_by_rank`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMeans:
    """Means of groups with intervals, all of shape (G,); NaN where a group has no values (or no spread to judge)."""

    mean: Floats
    low: Floats
    high: Floats
    num_values: Ints
    num_clusters: Ints


def rank_sums(
    values_P: Floats, group_P: Ints, num_groups: int, *, include_self: bool = False, correct_ties: bool = True
) -> tuple[Floats, Floats]:
    """Two-sided Wilcoxon rank-sum test of every group against the pooled values, z and p of shape (G,).

    Default: against the values of all *other* groups, equal to scipy's `mannwhitneyu(asymptotic, use_continuity=False)`
    (to `ranksums` with `correct_ties=False`). `include_self` tests against the whole pool, the group itself included, as
    the published statistics do; that equals `scipy.stats.ranksums(group, pool)`, which never corrects for ties.
    The values are treated as independent: with cells of few donors p mostly tells how many cells there are.
    """
    assert np.isfinite(values_P).all(), "rank_sums: values must be finite"
    total = len(values_P)
    ranks_P = stats.rankdata(values_P)
    size_G: Floats = np.bincount(group_P, minlength=num_groups).astype(np.float64)
    other_G: Floats
    all_G: Floats
    # U of a group against the whole pool: sum of (values below + half of the equal ones), itself included
    u_G: Floats = np.bincount(group_P, weights=ranks_P - 0.5, minlength=num_groups).astype(np.float64)
    if include_self:
        other_G, all_G, ties = np.full(num_groups, float(total)), total + size_G, 0.0
    else:
        u_G = u_G - size_G**2 / 2  # comparisons of a group with itself
        other_G, all_G = total - size_G, np.full(num_groups, float(total))
        counts = np.unique(values_P, return_counts=True)[1].astype(np.float64) if correct_ties else np.ones(1)
        ties = float((counts**3 - counts).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        variance_G = size_G * other_G / 12 * (all_G + 1 - ties / (all_G * (all_G - 1)))
        z_G = np.where(variance_G > 0, (u_G - size_G * other_G / 2) / np.sqrt(variance_G), 0.0)
    empty_G = (size_G == 0) | (other_G == 0)
    z_G = np.where(empty_G, np.nan, z_G)
    return z_G, 2 * special.ndtr(-np.abs(z_G))


def benjamini_hochberg(p_G: Floats) -> Floats:
    """False discovery rates; tests without a p-value (NaN) are not counted and stay NaN."""
    fdr_G = np.full(len(p_G), np.nan)
    tested = np.flatnonzero(np.isfinite(p_G))
    if len(tested):
        order = tested[np.argsort(p_G[tested], kind="stable")]
        scaled = p_G[order] * len(order) / np.arange(1, len(order) + 1)
        fdr_G[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return fdr_G


def cluster_means(
    values_P: Floats, group_P: Ints, cluster_P: Ints, num_groups: int, num_clusters: int
) -> tuple[Floats, Ints]:
    """Mean and number of the values of every (group, cluster), each (G, C); NaN where there are none."""
    cell_P = group_P * num_clusters + cluster_P
    size = num_groups * num_clusters
    num = np.bincount(cell_P, minlength=size).reshape(num_groups, num_clusters)
    total = np.bincount(cell_P, weights=values_P, minlength=size).reshape(num_groups, num_clusters)
    with np.errstate(invalid="ignore"):
        return np.where(num > 0, total / num, np.nan), num


def mean_by(values_P: NDArray[np.floating[Any]], group_P: Ints, num_groups: int) -> Floats:
    """Mean of each group's values, (G,); NaN where it has none."""
    with np.errstate(invalid="ignore"):
        return np.bincount(group_P, weights=values_P, minlength=num_groups) / np.bincount(group_P, minlength=num_groups)


def group_means(
    values_P: Floats, group_P: Ints, cluster_P: Ints, num_groups: int, num_clusters: int, *, confidence: float = 0.95
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


def less_background(mean_GC: Floats) -> Floats:
    """Cluster means less what the *other* groups have on average in the same cluster, (G, C).

    Few things happen to one gene alone: a perturbation of any gene moves the cells of a donor somewhat. What is left is
    the gene's own part. NaN where fewer than `MIN_BACKGROUND` other groups were measured in the cluster.
    """
    known_GC = np.isfinite(mean_GC)
    others_GC = known_GC.sum(axis=0, keepdims=True) - known_GC
    with np.errstate(invalid="ignore", divide="ignore"):
        background_GC = (np.nansum(mean_GC, axis=0, keepdims=True) - np.nan_to_num(mean_GC)) / others_GC
    return np.where(others_GC >= MIN_BACKGROUND, mean_GC - background_GC, np.nan)


def less_expected(mean_GC: Floats, rank_G: Floats) -> Floats:
    """Cluster means less what a gene's rank predicts in the same cluster, (G, C); `less_background` where ranks are too few.

    Where a perturbation's effect follows from the gene's rank, and differs by donor, all genes of high rank repeat over
    donors, and none of them means anything: only what is left is the gene's own part.
    """
    expected_GC = np.stack([expected_by_rank(column, rank_G) for column in mean_GC.T], axis=1)
    return np.where(np.isfinite(expected_GC), mean_GC - expected_GC, less_background(mean_GC))


def shuffled_neighbours(rank_G: Floats, num_clusters: int, rng: np.random.Generator, *, window: int = 25) -> Ints:
    """For each cluster a random exchange of groups of like rank, (C, G): group g's values go to group [c, g].

    What is left is what groups of like rank have in common in a cluster: no group has anything of its own that repeats
    over clusters. Tests of repetition must then give uniform p-values. Groups without a rank are exchanged among themselves.
    """
    order = np.argsort(np.where(np.isfinite(rank_G), rank_G, np.inf), kind="stable")
    blocks = np.array_split(order, max(1, len(order) // window))
    to_CG = np.empty((num_clusters, len(rank_G)), dtype=np.int64)
    for row in to_CG:
        for block in blocks:
            row[block] = rng.permutation(block)
    return to_CG


def sign_flip(mean_GC: Floats, num_permutations: int, rng: np.random.Generator) -> Floats:
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


def fewest_hits(num_clusters: int, num_tests: int, *, level: float = 0.05) -> int:
    """How many tests must reach the smallest possible p before any can pass Benjamini-Hochberg at `level`."""
    return max(1, int(np.ceil(smallest_p(num_clusters) * num_tests / level - 1e-9)))


def matched_percentile(effect_G: Floats, features_GF: Floats, *, num_matched: int = 100) -> Floats:
    """Percentile (0 to 100) of each effect among those of the most similar other groups.

    Similar means near in the ranks of the features (for genes: mean rank and coverage). Equal effects count half.
    NaN with fewer than `MIN_BACKGROUND` others, or without an effect.
    """
    result_G = np.full(len(effect_G), np.nan)
    usable = np.flatnonzero(np.isfinite(effect_G) & np.isfinite(features_GF).all(axis=1))
    if len(usable) <= MIN_BACKGROUND:
        return result_G
    points = np.stack([stats.rankdata(column) for column in features_GF[usable].T], axis=1) / len(usable)
    num = min(num_matched, len(usable) - 1)
    near = KDTree(points).query(points, k=num + 1)[1]
    itself = near == np.arange(len(usable))[:, None]
    itself[~itself.any(axis=1), -1] = True  # among many equal points the group itself may be missing: drop the farthest
    others = near[~itself].reshape(len(usable), num)
    effect, null = effect_G[usable][:, None], effect_G[usable][others]
    result_G[usable] = 100 * ((null < effect).mean(axis=1) + (null == effect).mean(axis=1) / 2)
    return result_G


def expected_by_rank(effect_G: Floats, rank_G: Floats, *, span: float = 0.3) -> Floats:
    """The effect that a gene's mean rank alone predicts: a local linear fit over the genes of similar rank, (G,).

    Tricube weights over the nearest `span` of all genes (at least 10, at most `MAX_WINDOW`); the gene itself has weight
    0, so that a strong effect does not explain itself. NaN with fewer than `MIN_BACKGROUND` other genes.
    """
    result_G = np.full(len(effect_G), np.nan)
    usable = np.flatnonzero(np.isfinite(effect_G) & np.isfinite(rank_G))
    num = len(usable)
    if num <= MIN_BACKGROUND:
        return result_G
    order = usable[np.argsort(rank_G[usable], kind="stable")]
    x, y = rank_G[order], effect_G[order]
    width = min(num, MAX_WINDOW, max(MIN_BACKGROUND + 1, round(span * num)))
    left = np.clip(np.arange(num) - width // 2, 0, num - width)
    predicted = np.empty(num)
    for start in range(0, num, 4096):
        rows = np.arange(start, min(start + 4096, num))
        window = left[rows, None] + np.arange(width)
        dx, yw = x[window] - x[rows, None], y[window]
        far = np.abs(dx).max(axis=1, keepdims=True)
        near = np.abs(dx) / np.where(far > 0, far * (1 + 1e-9), 1.0)
        weight = (1 - near**3) ** 3 * (window != rows[:, None])
        s0, s1, s2 = weight.sum(1), (weight * dx).sum(1), (weight * dx**2).sum(1)
        t0, t1 = (weight * yw).sum(1), (weight * dx * yw).sum(1)
        determinant = s0 * s2 - s1**2
        flat = determinant <= 1e-9 * s0 * s2  # all neighbours at one rank: their mean
        with np.errstate(invalid="ignore", divide="ignore"):
            predicted[rows] = np.where(flat, t0 / s0, (s2 * t0 - s1 * t1) / determinant)
    result_G[order] = predicted
    return result_G


def welch(num_2G: Floats, mean_2G: Floats, variance_2G: Floats) -> Floats:
    """Welch's t of the second row against the first, from numbers, means and unbiased variances of G groups each.

    NaN with fewer than 2 values on a side; infinite where constants differ.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        error_G = np.sqrt((variance_2G / num_2G).sum(axis=0))
        difference_G = mean_2G[1] - mean_2G[0]
        t_G = np.where(difference_G == 0, 0.0, difference_G / error_G)
    return np.where(num_2G.min(axis=0) >= 2, t_G, np.nan)


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Estimate:
    """A proportion with its Wilson score interval; NaN without trials."""
    if trials == 0:
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Estimate(value=successes / trials, low=float(interval.low), high=float(interval.high))


def auroc(score_G: Floats, known_G: Bools, *, confidence: float = 0.95) -> Estimate:
    """Area under the ROC curve of the scores for known against other genes, with DeLong's interval, cut to 0..1."""
    positive, negative = score_G[known_G], score_G[~known_G]
    m, n = len(positive), len(negative)
    if m == 0 or n == 0:
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - stats.rankdata(positive)) / n  # share of negatives below each positive
    below = 1 - (ranks[m:] - stats.rankdata(negative)) / m
    value = float(above.mean())
    if m < 2 or n < 2:
        return Estimate(value=value, low=float("nan"), high=float("nan"))
    half = float(special.ndtri(0.5 + confidence / 2)) * float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
    return Estimate(value=value, low=max(0.0, value - half), high=min(1.0, value + half))


def score_against(score_G: Floats, hit_G: Bools, known_G: Bools) -> dict[str, Estimate]:
    """How well hits and scores find a list of known genes: PPV, NPV, sensitivity, specificity, AUROC, with intervals.

    Genes without a score (NaN) are left out. Higher scores mean more likely.
    """
    scored = np.isfinite(score_G)
    score, hit, known = score_G[scored], hit_G[scored], known_G[scored]
    both, neither = int((hit & known).sum()), int((~hit & ~known).sum())
    return {
        "ppv": wilson(both, int(hit.sum())),
        "npv": wilson(neither, int((~hit).sum())),
        "sensitivity": wilson(both, int(known.sum())),
        "specificity": wilson(neither, int((~known).sum())),
        "auroc": auroc(score, known),
    }
