"""Perturbation effects beyond what the perturbed gene's rank predicts, and nulls among genes of similar rank.

Deleting a gene that stands early in a cell's sentence moves the embedding more than deleting a late one, whatever the
gene does. Effects are therefore compared with those of genes of similar mean rank.

Letters as in `stats.donors`: G groups (genes), C clusters (donors), F features.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats
from scipy.spatial import KDTree

from mixgf.arrays import Bools, Float64s, Ints
from mixgf.stats.donors import MIN_BACKGROUND, subtract_background

MAX_WINDOW = 401
"""Most neighbours in one local fit of `expected_by_rank`."""
SPAN, ROUNDS = 0.15, 2
"""Share of all genes in one local fit, and number of reweighting rounds that lower the weight of outliers."""
ALIKE, ENOUGH = 3.0, 5
"""Factor within which ranks are alike, and how many times more groups there must be than are matched (`residual_percentile`)."""
SCORED_AMONG = 50
"""Number of genes of similar rank among which `normal_scores` ranks a donor's value."""


def residual_after_rank(mean_GC: Float64s, rank_G: Float64s, among_G: Bools | None = None) -> Float64s:
    """Cluster means minus `expected_by_rank` of the same cluster, (G, C).

    Where the effect of a perturbation follows from the gene's rank, all genes of high rank move alike in every donor.
    The residual is the part that the gene's rank does not explain. Where too few genes have a rank for a fit,
    `subtract_background` is used.
    """
    expected_GC = np.stack([expected_by_rank(column, rank_G, among_G) for column in mean_GC.T], axis=1)
    return np.where(np.isfinite(expected_GC), mean_GC - expected_GC, subtract_background(mean_GC, among_G))


def normal_scores(
    own_GC: Float64s, rank_G: Float64s, among_G: Bools | None = None, *, num_matched: int = SCORED_AMONG
) -> Float64s:
    """Normal scores of each cluster's values within the groups of similar rank, (G, C).

    A sign-flip test assumes values that are symmetric about 0. Effects of genes are skewed, and the test would then reject
    too often (12 % at p <= 0.05 for log-normal effects and eight donors). Percentiles among similar genes are uniform under
    the null, so their normal scores are symmetric. Values that were normal keep their size, and the test its power.
    NaN as in `matched_percentile`.
    """
    scores = np.full(own_GC.shape, np.nan)
    candidate_G = np.isfinite(rank_G) if among_G is None else np.isfinite(rank_G) & among_G
    for c, column in enumerate(own_GC.T):
        num = max(1, min(num_matched, int((candidate_G & np.isfinite(column)).sum()) - 1))
        share_G = matched_percentile(column, rank_G[:, None], among_G, num_matched=num_matched) / 100
        scores[:, c] = special.ndtri((share_G * num + 0.5) / (num + 1))
    return scores


def permute_within_rank(rank_G: Float64s, measured_GC: Bools, rng: np.random.Generator, *, window: int = 25) -> Ints:
    """Random permutation of the groups within blocks of similar rank, one per cluster.

    After it no group has an effect of its own that repeats over clusters, so a test of repetition must give uniform
    p-values. Groups without a rank are permuted among themselves.

    Args:
        rank_G: mean rank of each group; NaN = none.
        measured_GC: whether the cluster has a value of the group; groups without one keep their place.
        rng: source of the permutations.
        window: about how many groups make a block.

    Returns:
        int64 (C, G): values of group g go to group [c, g].
    """
    order = np.argsort(np.where(np.isfinite(rank_G), rank_G, np.inf), kind="stable")
    to_CG = np.tile(np.arange(len(rank_G)), (measured_GC.shape[1], 1))
    for row, measured_G in zip(to_CG, measured_GC.T, strict=True):
        present = order[measured_G[order]]
        for block in np.array_split(present, max(1, len(present) // window)):
            row[block] = rng.permutation(block)
    return to_CG


def matched_percentile(
    effect_G: Float64s, features_GF: Float64s, among_G: Bools | None = None, *, num_matched: int = 100
) -> Float64s:
    """Percentile (0 to 100) of each effect among those of the most similar other groups, (G,).

    Args:
        effect_G: effects; NaN = none.
        features_GF: similarity is nearness in the ranks of these (for genes: mean rank and coverage).
        among_G: groups that others are compared with; None = all.
        num_matched: number of similar groups.

    Returns:
        Percentiles, equal effects counted half; NaN without an effect, or with fewer than `MIN_BACKGROUND` other groups.
    """
    result_G = np.full(len(effect_G), np.nan)
    usable = np.flatnonzero(np.isfinite(effect_G) & np.isfinite(features_GF).all(axis=1))
    candidates = np.arange(len(usable)) if among_G is None else np.flatnonzero(among_G[usable])
    if len(candidates) <= MIN_BACKGROUND:
        return result_G
    points = np.stack([stats.rankdata(column) for column in features_GF[usable].T], axis=1) / len(usable)
    num = min(num_matched, len(candidates) - 1)
    near = candidates[KDTree(points[candidates]).query(points, k=num + 1)[1]]
    itself = near == np.arange(len(usable))[:, None]
    itself[~itself.any(axis=1), -1] = True  # not among the candidates, or one of many equal points: drop the farthest
    others = near[~itself].reshape(len(usable), num)
    effect, null = effect_G[usable][:, None], effect_G[usable][others]
    result_G[usable] = 100 * ((null < effect).mean(axis=1) + (null == effect).mean(axis=1) / 2)
    return result_G


def residual_percentile(
    effect_G: Float64s,
    scaled_G: Float64s,
    rank_G: Float64s,
    coverage_G: Float64s,
    among_G: Bools | None = None,
    *,
    num_matched: int = 100,
) -> Float64s:
    """Percentile (0 to 100) of each effect, beyond what its rank predicts, among those of other groups, (G,).

    The effect less `expected_by_rank` is divided by the spread of such residuals at that rank, and by the error of the
    expectation. These are comparable over all ranks. So all groups of `among_G` are the comparison; only if there are
    `ENOUGH` times `num_matched` of them, it is the most similar ones (`matched_percentile`).

    Args:
        effect_G: effects; NaN = none.
        scaled_G: their `scaled_residual`.
        rank_G: log of the mean rank of each gene.
        coverage_G: share of cells with the gene.
        among_G: groups that others are compared with; None = all.
        num_matched: number of similar groups.

    Returns:
        NaN without an effect, or where fewer than `MIN_BACKGROUND` other groups have a rank within a factor of `ALIKE`, or
        fewer than half of that many an earlier or equal one: there the expectation would be extrapolated.
    """
    num = int((np.isfinite(effect_G) & np.isfinite(rank_G) & (True if among_G is None else among_G)).sum())
    if num < ENOUGH * num_matched:
        num_matched = num
    return matched_percentile(scaled_G, np.stack([rank_G, coverage_G], axis=1), among_G, num_matched=num_matched)


def scaled_residual(effect_G: Float64s, rank_G: Float64s, among_G: Bools | None = None) -> Float64s:
    """Effects less `expected_by_rank`, in units of the spread of such residuals at that rank, (G,).

    The spread is a robust one of the genes of `among_G`, and includes the error of the expectation. Arguments and NaN as in
    `residual_percentile`.
    """
    own_G = np.isfinite(effect_G) & np.isfinite(rank_G) & (True if among_G is None else among_G)
    expected_G, error_G = _rank_fit(effect_G, rank_G, among_G, span=SPAN, errors=True)
    residual_G = effect_G - expected_G
    size_G = np.abs(residual_G)
    if not np.isfinite(size_G[own_G]).any():
        return np.full(len(effect_G), np.nan)
    spread_G = expected_by_rank(size_G, rank_G, among_G, span=0.5) * np.sqrt(
        np.pi / 2
    )  # of a normal, from its mean absolute value
    spread_G = np.maximum(spread_G, 0.1 * np.nanmedian(size_G[own_G]))
    scaled_G = residual_G / np.hypot(spread_G, error_G)
    places = np.sort(rank_G[own_G])
    own, above, upto = own_G.astype(np.int64), *(np.searchsorted(places, rank_G + by) for by in (-np.log(ALIKE), 0))
    within_G = np.searchsorted(places, rank_G + np.log(ALIKE), "right") - above - own
    equal_G = np.searchsorted(places, rank_G, "right") - upto - own
    scaled_G[(within_G < MIN_BACKGROUND) | (upto - above + equal_G < MIN_BACKGROUND // 2)] = np.nan
    return scaled_G


def null_p_values(scaled_G: Float64s, null_GB: Float64s) -> Float64s:
    """Two-sided empirical p of each residual among residuals that mean nothing, (G,).

    p = 2 * (1 + number at least as far in the same direction) / (1 + number), at most 1. It is never 0. A gene's own
    residuals do not count against it.

    Args:
        scaled_G: residuals by `scaled_residual`; NaN = none.
        null_GB: such residuals where there is nothing to find, by gene and null; NaN = not used.

    Returns:
        NaN without a residual, or with fewer than `MIN_BACKGROUND` values of other genes.
    """
    pool = np.sort(null_GB[np.isfinite(null_GB)])
    own_GB = np.where(np.isfinite(null_GB), null_GB, np.nan)
    num_G = len(pool) - np.isfinite(own_GB).sum(axis=1)
    with np.errstate(invalid="ignore"):
        above_G = len(pool) - np.searchsorted(pool, scaled_G, "left") - (own_GB >= scaled_G[:, None]).sum(axis=1)
        below_G = np.searchsorted(pool, scaled_G, "right") - (own_GB <= scaled_G[:, None]).sum(axis=1)
    p_G = np.minimum(1.0, 2 * (1 + np.minimum(above_G, below_G)) / (1 + num_G))
    return np.where(np.isfinite(scaled_G) & (num_G >= MIN_BACKGROUND), p_G, np.nan)


def expected_by_rank(
    effect_G: Float64s, rank_G: Float64s, among_G: Bools | None = None, *, span: float = SPAN
) -> Float64s:
    """Effect that a gene's mean rank predicts: a robust local linear fit (LOWESS, Cleveland 1979), (G,).

    Give log ranks: effects fall steeply over the first ranks, and a line over ranks is biased there, in every donor alike.

    The fit has tricube weights over the nearest `span` of the genes, at least 21 and at most `MAX_WINDOW`: a wider window
    would be biased at the first ranks, in every donor alike. The gene itself has weight 0, so that a strong effect does
    not explain itself. `ROUNDS` of bisquare weights keep strong effects from shifting their neighbours' fits.

    Args:
        effect_G: effects; NaN = none.
        rank_G: mean rank of each gene, or its log; NaN = none.
        among_G: genes whose effects are fitted; None = all. The others get a prediction, too.
        span: share of the genes in one fit.

    Returns:
        NaN without an effect or a rank, or with fewer than `MIN_BACKGROUND` other genes.
    """
    return _rank_fit(effect_G, rank_G, among_G, span=span, errors=False)[0]


def expectation_error(effect_G: Float64s, rank_G: Float64s, among_G: Bools | None = None) -> Float64s:
    """Standard error of `expected_by_rank`, (G,): the heteroscedasticity-robust (sandwich) error of the local line."""
    return _rank_fit(effect_G, rank_G, among_G, span=SPAN, errors=True)[1]


def _rank_fit(
    effect_G: Float64s, rank_G: Float64s, among_G: Bools | None, *, span: float, errors: bool
) -> tuple[Float64s, Float64s]:
    result_G, error_G = np.full(len(effect_G), np.nan), np.full(len(effect_G), np.nan)
    usable = np.isfinite(effect_G) & np.isfinite(rank_G)
    own_G = usable if among_G is None else usable & among_G
    fitted, outside = np.flatnonzero(own_G), np.flatnonzero(usable & ~own_G)
    num = len(fitted)
    if num <= MIN_BACKGROUND:
        return result_G, error_G
    fitted = fitted[np.argsort(rank_G[fitted], kind="stable")]
    x_N, y_N = rank_G[fitted], effect_G[fitted]
    width = min(num, MAX_WINDOW, max(2 * MIN_BACKGROUND + 1, round(span * num)))
    query = np.concatenate([x_N, rank_G[outside]])
    place = np.concatenate([np.arange(num), np.searchsorted(x_N, rank_G[outside])])
    own = np.concatenate([np.arange(num), np.full(len(outside), -1)])
    left = np.clip(place - width // 2, 0, num - width)
    predicted, error = np.empty(len(query)), np.full(len(query), np.nan)
    residual_N: Float64s | None = None
    for iteration in range(ROUNDS + 1):
        for start in range(0, len(query), 4096):
            rows = slice(start, start + 4096)
            window = left[rows, None] + np.arange(width)
            dx = x_N[window] - query[rows, None]
            far = np.abs(dx).max(axis=1, keepdims=True)
            near = np.abs(dx) / np.where(far > 0, far * (1 + 1e-9), 1.0)
            weight = (1 - near**3) ** 3 * (window != own[rows, None])
            if residual_N is not None:
                weight = weight * _bisquare(np.abs(residual_N[window]))
            predicted[rows] = _local_line(weight, dx, y_N[window])
            if errors and residual_N is not None and iteration == ROUNDS:
                error[rows] = _line_error(weight, dx, residual_N[window])
        residual_N = y_N - predicted[:num]
    result_G[np.concatenate([fitted, outside])], error_G[np.concatenate([fitted, outside])] = predicted, error
    return result_G, error_G


def _bisquare(residual_RW: Float64s) -> Float64s:
    """Weights that fall to 0 at six times the window's median absolute residual."""
    limit_R1 = 6 * np.median(residual_RW, axis=1, keepdims=True)
    return np.where(
        limit_R1 > 0, (1 - np.minimum(residual_RW / np.where(limit_R1 > 0, limit_R1, 1.0), 1) ** 2) ** 2, 1.0
    )


def _moments(weight_RW: Float64s, dx_RW: Float64s) -> tuple[Float64s, Float64s, Float64s, Float64s, Bools]:
    """Per row: weighted sums of the powers 0 to 2 of x, the determinant of the line, and whether all x are equal."""
    s0, s1, s2 = weight_RW.sum(1), (weight_RW * dx_RW).sum(1), (weight_RW * dx_RW**2).sum(1)
    determinant = s0 * s2 - s1**2
    return s0, s1, s2, determinant, determinant <= 1e-9 * s0 * s2


def _local_line(weight_RW: Float64s, dx_RW: Float64s, y_RW: Float64s) -> Float64s:
    """Value at x = 0 of the weighted least-squares line of each row; the weighted mean where all x are equal."""
    s0, s1, s2, determinant, flat = _moments(weight_RW, dx_RW)
    t0, t1 = (weight_RW * y_RW).sum(1), (weight_RW * dx_RW * y_RW).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat, t0 / s0, (s2 * t0 - s1 * t1) / determinant)


def _line_error(weight_RW: Float64s, dx_RW: Float64s, residual_RW: Float64s) -> Float64s:
    """Standard error of the values of `_local_line`, from the residual of each y."""
    s0, s1, s2, determinant, flat = _moments(weight_RW, dx_RW)
    with np.errstate(invalid="ignore", divide="ignore"):
        line_RW = weight_RW * ((s2[:, None] - s1[:, None] * dx_RW) / determinant[:, None])
        share_RW = np.where(flat[:, None], weight_RW / s0[:, None], line_RW)
    return np.sqrt(((share_RW * residual_RW) ** 2).sum(1))
