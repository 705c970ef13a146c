"""What a gene rank alone predicts; matched nulls."""

from __future__ import annotations

import numpy as np
from scipy import special, stats
from scipy.spatial import KDTree

from mixgf.arrays import Bools, Float64s, Ints
from mixgf.stats.donors import MIN_BACKGROUND, less_background

MAX_WINDOW = 401
"""Most neighbours in one local fit of `expected_by_rank`."""
SPAN, ROUNDS = 0.15, 2
"""Share of the genes in such a fit, and how often outliers among them are weighed down."""
SCORED_AMONG = 50
"""Genes of like rank among which a donor's value is placed before its sign is flipped."""


def residual_after_rank(mean_GC: Float64s, rank_G: Float64s, among_G: Bools | None = None) -> Float64s:
    """Cluster means less what a gene's rank predicts in the same cluster, (G, C); `less_background` where ranks are too few.

    Where a perturbation's effect follows from the gene's rank, and differs by donor, all genes of high rank repeat over
    donors, and none of them means anything: only what is left is the gene's own part.
    """
    expected_GC = np.stack([expected_by_rank(column, rank_G, among_G) for column in mean_GC.T], axis=1)
    return np.where(np.isfinite(expected_GC), mean_GC - expected_GC, less_background(mean_GC, among_G))


def normal_scores(
    own_GC: Float64s, rank_G: Float64s, among_G: Bools | None = None, *, num_matched: int = SCORED_AMONG
) -> Float64s:
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


def shuffled_neighbours(rank_G: Float64s, known_GC: Bools, rng: np.random.Generator, *, window: int = 25) -> Ints:
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


def matched_percentile(
    effect_G: Float64s, features_GF: Float64s, among_G: Bools | None = None, *, num_matched: int = 100
) -> Float64s:
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


def expected_by_rank(
    effect_G: Float64s, rank_G: Float64s, among_G: Bools | None = None, *, span: float = SPAN
) -> Float64s:
    """The effect that a gene's mean rank alone predicts: a robust local linear fit over the genes of similar rank, (G,).

    Tricube weights over the nearest `span` of the genes (at least 20, at most `MAX_WINDOW`; a wide window bends away from
    what the first few ranks do, in every donor alike, and calls the top genes special); the gene itself has weight
    0, so that a strong effect does not explain itself. `ROUNDS` of bisquare weights by the residuals (Cleveland 1979) keep
    it from passing for ordinary among its neighbours, too. `among_G` says whose effects are fitted; None = everybody's.
    NaN with fewer than `MIN_BACKGROUND` other genes.
    """
    return _rank_fit(effect_G, rank_G, among_G, span=span, errors=False)[0]


def expectation_error(effect_G: Float64s, rank_G: Float64s, among_G: Bools | None = None) -> Float64s:
    """Standard error of `expected_by_rank`, (G,).

    An expectation is a weighted sum of the effects around it; it errs as these do, each by what it is away from its own
    expectation (the sandwich of a regression).
    """
    return _rank_fit(effect_G, rank_G, among_G, span=SPAN, errors=True)[1]


def _rank_fit(
    effect_G: Float64s, rank_G: Float64s, among_G: Bools | None, *, span: float, errors: bool
) -> tuple[Float64s, Float64s]:
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
    residual_N: Float64s | None = None
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


def _bisquare(residual_RW: Float64s) -> Float64s:
    """Weights that fall to 0 at six times the window's median absolute residual."""
    limit_R1 = 6 * np.median(residual_RW, axis=1, keepdims=True)
    return np.where(
        limit_R1 > 0, (1 - np.minimum(residual_RW / np.where(limit_R1 > 0, limit_R1, 1.0), 1) ** 2) ** 2, 1.0
    )


def _moments(weight_RW: Float64s, dx_RW: Float64s) -> tuple[Float64s, Float64s, Float64s, Float64s, Bools]:
    """Of each row's weighted points in x: sums of powers 0 to 2, the line's determinant, and whether they do not differ."""
    s0, s1, s2 = weight_RW.sum(1), (weight_RW * dx_RW).sum(1), (weight_RW * dx_RW**2).sum(1)
    determinant = s0 * s2 - s1**2
    return s0, s1, s2, determinant, determinant <= 1e-9 * s0 * s2


def _local_line(weight_RW: Float64s, dx_RW: Float64s, y_RW: Float64s) -> Float64s:
    """Value at 0 of the weighted line through each row's points; their weighted mean where they do not differ in x."""
    s0, s1, s2, determinant, flat = _moments(weight_RW, dx_RW)
    t0, t1 = (weight_RW * y_RW).sum(1), (weight_RW * dx_RW * y_RW).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat, t0 / s0, (s2 * t0 - s1 * t1) / determinant)


def _line_error(weight_RW: Float64s, dx_RW: Float64s, residual_RW: Float64s) -> Float64s:
    """Standard error of `_local_line`'s values, where each y errs by its residual."""
    s0, s1, s2, determinant, flat = _moments(weight_RW, dx_RW)
    with np.errstate(invalid="ignore", divide="ignore"):
        line_RW = weight_RW * ((s2[:, None] - s1[:, None] * dx_RW) / determinant[:, None])
        share_RW = np.where(flat[:, None], weight_RW / s0[:, None], line_RW)
    return np.sqrt(((share_RW * residual_RW) ** 2).sum(1))
