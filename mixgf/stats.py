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
SPAN, ROUNDS = 0.15, 2
"""Share of the genes in such a fit, and how often outliers among them are weighed down."""
SCORED_AMONG = 50
"""Genes of like rank among which a donor's value is placed before its sign is flipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMeans:
    """Means of groups with intervals, all of shape (G,); NaN where a group has no values (or no spread to judge)."""

    mean: Floats
    low: Floats
    high: Floats
    num_values: Ints
    num_clusters: Ints


def rank_sums(
    values_P: Floats,
    group_P: Ints,
    num_groups: int,
    *,
    among_G: Bools | None = None,
    include_self: bool = False,
    correct_ties: bool = True,
) -> tuple[Floats, Floats]:
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
    size_G: Floats = np.bincount(group_P, minlength=num_groups).astype(np.float64)
    # U of a group against the whole pool: sum of (values below + half of the equal ones), itself included where it is there
    below_P = (np.searchsorted(pool, values_P, "left") + np.searchsorted(pool, values_P, "right")) / 2
    u_G: Floats = np.bincount(group_P, weights=below_P, minlength=num_groups).astype(np.float64)
    other_G: Floats = np.full(num_groups, float(len(pool)))
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


def _ties(values_P: Floats, group_P: Ints, pooled_G: Bools) -> Floats:
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


def benjamini_hochberg(p_G: Floats, num_tests: int = 0) -> Floats:
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


def less_background(mean_GC: Floats, among_G: Bools | None = None) -> Floats:
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


def less_expected(mean_GC: Floats, rank_G: Floats, among_G: Bools | None = None) -> Floats:
    """Cluster means less what a gene's rank predicts in the same cluster, (G, C); `less_background` where ranks are too few.

    Where a perturbation's effect follows from the gene's rank, and differs by donor, all genes of high rank repeat over
    donors, and none of them means anything: only what is left is the gene's own part.
    """
    expected_GC = np.stack([expected_by_rank(column, rank_G, among_G) for column in mean_GC.T], axis=1)
    return np.where(np.isfinite(expected_GC), mean_GC - expected_GC, less_background(mean_GC, among_G))


def normal_scores(
    own_GC: Floats, rank_G: Floats, among_G: Bools | None = None, *, num_matched: int = SCORED_AMONG
) -> Floats:
    """Each cluster's values as normal scores of their places among the groups of like rank, (G, C).

    A sign flip asks whether values are symmetric about 0. What genes do on their own is skewed, as a few do much: the mean
    of nothing is then found significant too often (12 % at p <= 0.05 for log-normal effects and eight donors). A place among
    others is symmetric whatever the others' distribution, and any one place is as likely as another where a donor gives
    a gene its neighbours' luck. Normal, so that normal values keep their size and the stated power. NaN as in `matched_percentile`.
    """
    scores = np.full(own_GC.shape, np.nan)
    company_G = np.isfinite(rank_G) if among_G is None else np.isfinite(rank_G) & among_G
    for c, column in enumerate(own_GC.T):
        num = max(1, min(num_matched, int((company_G & np.isfinite(column)).sum()) - 1))
        share_G = matched_percentile(column, rank_G[:, None], among_G, num_matched=num_matched) / 100
        scores[:, c] = special.ndtri((share_G * num + 0.5) / (num + 1))
    return scores


def shuffled_neighbours(rank_G: Floats, known_GC: Bools, rng: np.random.Generator, *, window: int = 25) -> Ints:
    """For each cluster a random exchange of groups of like rank, (C, G): group g's values go to group [c, g].

    What is left is what groups of like rank have in common in a cluster: no group has anything of its own that repeats
    over clusters. Tests of repetition must then give uniform p-values. Groups without a rank are exchanged among
    themselves, groups that a cluster does not know keep their place there.
    """
    order = np.argsort(np.where(np.isfinite(rank_G), rank_G, np.inf), kind="stable")
    to_CG = np.tile(np.arange(len(rank_G)), (known_GC.shape[1], 1))
    for row, known_G in zip(to_CG, known_GC.T, strict=True):
        present = order[known_G[order]]
        for block in np.array_split(present, max(1, len(present) // window)):
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


def attainable(num_clusters: int, level: float = 0.05) -> float:
    """Share of p-values at or below `level` that an exact sign-flip test gives where there is nothing: p has few values."""
    return np.floor(level / smallest_p(num_clusters) + 1e-9) * smallest_p(num_clusters)


def fewest_hits(num_clusters: int, num_tests: int, *, level: float = 0.05) -> int:
    """How many tests must reach the smallest possible p before any can pass Benjamini-Hochberg at `level`."""
    return max(1, int(np.ceil(smallest_p(num_clusters) * num_tests / level - 1e-9)))


def matched_percentile(
    effect_G: Floats, features_GF: Floats, among_G: Bools | None = None, *, num_matched: int = 100
) -> Floats:
    """Percentile (0 to 100) of each effect among those of the most similar other groups.

    Similar means near in the ranks of the features (for genes: mean rank and coverage). Equal effects count half. `among_G`
    says who may be compared with; None = everybody. NaN with fewer than `MIN_BACKGROUND` others, or without an effect.
    """
    result_G = np.full(len(effect_G), np.nan)
    usable = np.flatnonzero(np.isfinite(effect_G) & np.isfinite(features_GF).all(axis=1))
    company = np.arange(len(usable)) if among_G is None else np.flatnonzero(among_G[usable])
    if len(company) <= MIN_BACKGROUND:
        return result_G
    points = np.stack([stats.rankdata(column) for column in features_GF[usable].T], axis=1) / len(usable)
    num = min(num_matched, len(company) - 1)
    near = company[KDTree(points[company]).query(points, k=num + 1)[1]]
    itself = near == np.arange(len(usable))[:, None]
    itself[~itself.any(axis=1), -1] = True  # not in the company, or lost among many equal points: drop the farthest
    others = near[~itself].reshape(len(usable), num)
    effect, null = effect_G[usable][:, None], effect_G[usable][others]
    result_G[usable] = 100 * ((null < effect).mean(axis=1) + (null == effect).mean(axis=1) / 2)
    return result_G


def spearman(a_G: Floats, b_G: Floats) -> float:
    """Rank correlation over the groups that have both values; NaN with fewer than five of them, or where a side is constant."""
    both_G = np.isfinite(a_G) & np.isfinite(b_G)
    if both_G.sum() < 5:
        return float("nan")
    a, b = (ranks - ranks.mean() for ranks in (stats.rankdata(a_G[both_G]), stats.rankdata(b_G[both_G])))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


def expected_by_rank(effect_G: Floats, rank_G: Floats, among_G: Bools | None = None, *, span: float = SPAN) -> Floats:
    """The effect that a gene's mean rank alone predicts: a robust local linear fit over the genes of similar rank, (G,).

    Tricube weights over the nearest `span` of the genes (at least 20, at most `MAX_WINDOW`; a wide window bends away from
    what the first few ranks do, in every donor alike, and calls the top genes special); the gene itself has weight
    0, so that a strong effect does not explain itself. `ROUNDS` of bisquare weights by the residuals (Cleveland 1979) keep
    it from passing for ordinary among its neighbours, too. `among_G` says whose effects are fitted; None = everybody's.
    NaN with fewer than `MIN_BACKGROUND` other genes.
    """
    return _rank_fit(effect_G, rank_G, among_G, span=span, errors=False)[0]


def expectation_error(effect_G: Floats, rank_G: Floats, among_G: Bools | None = None) -> Floats:
    """Standard error of `expected_by_rank`, (G,).

    An expectation is a weighted sum of the effects around it; it errs as these do, each by what it is away from its own
    expectation (the sandwich of a regression).
    """
    return _rank_fit(effect_G, rank_G, among_G, span=SPAN, errors=True)[1]


def _rank_fit(
    effect_G: Floats, rank_G: Floats, among_G: Bools | None, *, span: float, errors: bool
) -> tuple[Floats, Floats]:
    result_G, error_G = np.full(len(effect_G), np.nan), np.full(len(effect_G), np.nan)
    usable = np.isfinite(effect_G) & np.isfinite(rank_G)
    own_G = usable if among_G is None else usable & among_G
    fitted, guests = np.flatnonzero(own_G), np.flatnonzero(usable & ~own_G)
    num = len(fitted)
    if num <= MIN_BACKGROUND:
        return result_G, error_G
    fitted = fitted[np.argsort(rank_G[fitted], kind="stable")]
    x_N, y_N = rank_G[fitted], effect_G[fitted]
    width = min(num, MAX_WINDOW, max(2 * MIN_BACKGROUND + 1, round(span * num)))
    asked = np.concatenate([x_N, rank_G[guests]])
    place = np.concatenate([np.arange(num), np.searchsorted(x_N, rank_G[guests])])
    own = np.concatenate([np.arange(num), np.full(len(guests), -1)])
    left = np.clip(place - width // 2, 0, num - width)
    predicted, error = np.empty(len(asked)), np.full(len(asked), np.nan)
    residual_N: Floats | None = None
    for turn in range(ROUNDS + 1):
        for start in range(0, len(asked), 4096):
            rows = slice(start, start + 4096)
            window = left[rows, None] + np.arange(width)
            dx = x_N[window] - asked[rows, None]
            far = np.abs(dx).max(axis=1, keepdims=True)
            near = np.abs(dx) / np.where(far > 0, far * (1 + 1e-9), 1.0)
            weight = (1 - near**3) ** 3 * (window != own[rows, None])
            if residual_N is not None:
                weight = weight * _bisquare(np.abs(residual_N[window]))
            predicted[rows] = _local_line(weight, dx, y_N[window])
            if errors and residual_N is not None and turn == ROUNDS:
                error[rows] = _line_error(weight, dx, residual_N[window])
        residual_N = y_N - predicted[:num]
    result_G[np.concatenate([fitted, guests])], error_G[np.concatenate([fitted, guests])] = predicted, error
    return result_G, error_G


def _bisquare(residual_RW: Floats) -> Floats:
    """Weights that fall to 0 at six times the window's median absolute residual."""
    limit_R1 = 6 * np.median(residual_RW, axis=1, keepdims=True)
    return np.where(
        limit_R1 > 0, (1 - np.minimum(residual_RW / np.where(limit_R1 > 0, limit_R1, 1.0), 1) ** 2) ** 2, 1.0
    )


def _moments(weight_RW: Floats, dx_RW: Floats) -> tuple[Floats, Floats, Floats, Floats, Bools]:
    """Of each row's weighted points in x: sums of powers 0 to 2, the line's determinant, and whether they do not differ."""
    s0, s1, s2 = weight_RW.sum(1), (weight_RW * dx_RW).sum(1), (weight_RW * dx_RW**2).sum(1)
    determinant = s0 * s2 - s1**2
    return s0, s1, s2, determinant, determinant <= 1e-9 * s0 * s2


def _local_line(weight_RW: Floats, dx_RW: Floats, y_RW: Floats) -> Floats:
    """Value at 0 of the weighted line through each row's points; their weighted mean where they do not differ in x."""
    s0, s1, s2, determinant, flat = _moments(weight_RW, dx_RW)
    t0, t1 = (weight_RW * y_RW).sum(1), (weight_RW * dx_RW * y_RW).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat, t0 / s0, (s2 * t0 - s1 * t1) / determinant)


def _line_error(weight_RW: Floats, dx_RW: Floats, residual_RW: Floats) -> Floats:
    """Standard error of `_local_line`'s values, where each y errs by its residual."""
    s0, s1, s2, determinant, flat = _moments(weight_RW, dx_RW)
    with np.errstate(invalid="ignore", divide="ignore"):
        line_RW = weight_RW * ((s2[:, None] - s1[:, None] * dx_RW) / determinant[:, None])
        share_RW = np.where(flat[:, None], weight_RW / s0[:, None], line_RW)
    return np.sqrt(((share_RW * residual_RW) ** 2).sum(1))


def welch(num_2G: Floats, mean_2G: Floats, variance_2G: Floats) -> Floats:
    """Welch's t of the second row against the first, from numbers, means and unbiased variances of G groups each.

    NaN with fewer than 2 values on a side; infinite where constants differ.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        error_G = np.sqrt((variance_2G / num_2G).sum(axis=0))
        difference_G = mean_2G[1] - mean_2G[0]
        t_G = np.where(difference_G == 0, 0.0, difference_G / error_G)
    return np.where(num_2G.min(axis=0) >= 2, t_G, np.nan)
