"""After a screen: which genes are scored exactly, in which order, with whom they are compared, and whether it may be trusted.

The estimates are checked on genes drawn at random, which are scored exactly whatever their estimate: a check on the best ones
alone would be a check on the few that the screen itself chose. For the same reason the best are not compared with each
other: a place among genes that were all chosen for being extreme says nothing. Their matched is drawn among all genes of
their rank and coverage, chosen or not, and so is as extreme as genes are.

Letters: P (cell, gene) pairs, K genes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

STRATA = 5
"""Bands of each feature within which genes count as alike."""
TOP_SHARE = 0.1
"""The share of the sample that counts as its top; it is looked for in twice as many of the best estimates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortlist:
    """Genes in the order in which they are scored exactly: the sample, the best by estimate, their matched, the rest."""

    sample: NDArray[np.int64]
    top: NDArray[np.int64]
    """Best first, less those of the sample."""
    matched: NDArray[np.int64]
    """Drawn like the best ones, less those that are in sample or top."""
    rest: NDArray[np.int64]
    drawn: NDArray[np.int64]
    """All that were drawn without regard to their estimates: sample, matched, and those of the best that the draw hit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How well estimates rank the genes of the sample."""

    spearman: float
    """NaN = one of the two does not differ between genes."""
    recall: float
    """Share of the exact top found among twice as many of the best estimates."""
    num_genes: int

    def reaches(self, least: float) -> bool:
        """Whether the rank correlation is at least this; one that is not a number never is."""
        return self.spearman >= least


def choose_shortlist(
    estimate_OK: NDArray[np.float64],
    features_KF: NDArray[np.float64],
    *,
    top: int,
    sample: int,
    nulls: int,
    direction: str,
    rng: np.random.Generator,
) -> Shortlist:
    """Choose by estimate. A gene counts for its best place under any of the operations and in either direction.

    Args:
        estimate_OK: estimated shift of every gene by operation, NaN = none: sets of genes, which are always scored.
        features_KF: what the matched is like the best ones in, NaN for sets.
        top: genes of each operation to score exactly besides the sample.
        sample: genes to draw among those with an estimate.
        nulls: genes to draw like the best.
        direction: `towards` the goal (highest estimates), `away` from it (lowest), or `both`, half of `top` each.
        rng: draws.
    """
    tails = {"towards": [estimate_OK], "away": [-estimate_OK], "both": [estimate_OK, -estimate_OK]}[direction]
    top, estimate_OK = -(-top // len(tails)), np.concatenate(tails)
    num = estimate_OK.shape[1]
    some_K = np.isfinite(estimate_OK).any(axis=0)
    drawn = np.sort(rng.choice(np.flatnonzero(some_K), min(sample, int(some_K.sum())), replace=False)).astype(np.int64)
    order_OK = np.argsort(-np.nan_to_num(estimate_OK, nan=-np.inf), axis=1, kind="stable")
    place_OK = np.empty_like(order_OK)
    np.put_along_axis(place_OK, order_OK, np.broadcast_to(np.arange(num), order_OK.shape), axis=1)
    place_K = np.where(some_K, place_OK.min(axis=0), -1)
    order = np.argsort(place_K, kind="stable").astype(np.int64)
    order = order[~np.isin(order, drawn)]
    chosen = place_K[order] < top
    best, others = order[chosen], order[~chosen]
    alike = draw_similar(features_KF, np.flatnonzero(some_K & (place_K < top)), nulls, taken=drawn, rng=rng)
    beside = np.isin(others, alike)
    return Shortlist(
        sample=drawn,
        top=best,
        matched=others[beside],
        rest=others[~beside],
        drawn=np.sort(np.concatenate([drawn, alike])),
    )


def draw_similar(
    features_KF: NDArray[np.float64],
    wanted: NDArray[np.int64],
    num: int,
    *,
    taken: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Genes drawn at random, as many in every stratum of the features as the wanted ones' share says, (up to `num`,).

    The wanted ones can be drawn, too: within a stratum every gene is as likely as any other, so that the drawn ones speak
    for all. `taken` ones cannot, as they are drawn already. Strata are cut at even shares of genes, `STRATA` by feature.
    """
    usable = np.flatnonzero(np.isfinite(features_KF).all(axis=1))
    if not (num and len(wanted) and len(usable)):
        return np.empty(0, dtype=np.int64)
    stratum_K = np.full(len(features_KF), -1)
    places = [stats.rankdata(column) for column in features_KF[usable].T]
    codes = [np.minimum((place - 0.5) * STRATA // len(usable), STRATA - 1).astype(np.int64) for place in places]
    stratum_K[usable] = np.ravel_multi_index(codes, (STRATA,) * len(codes))
    names, counts = np.unique(stratum_K[wanted][stratum_K[wanted] >= 0], return_counts=True)
    ends = np.round(np.cumsum(counts) / counts.sum() * num).astype(np.int64)  # shares that add up
    drawn = []
    for name, share in zip(names.tolist(), np.diff(ends, prepend=0).tolist(), strict=True):
        free = np.setdiff1d(np.flatnonzero(stratum_K == name), taken)
        drawn.append(rng.choice(free, min(share, len(free)), replace=False))
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def estimate_agreement(estimate_K: NDArray[np.float64], exact_K: NDArray[np.float64]) -> Agreement:
    """Compare estimated with exact shifts of the same genes; genes that lack either are left out."""
    both = np.isfinite(estimate_K) & np.isfinite(exact_K)
    estimated, exact = estimate_K[both], exact_K[both]
    num = len(exact)
    if num < 3 or np.ptp(estimated) == 0 or np.ptp(exact) == 0:
        return Agreement(spearman=math.nan, recall=math.nan, num_genes=num)
    k = math.ceil(num * TOP_SHARE)
    truth = np.argsort(-exact, kind="stable")[:k]
    found = np.argsort(-estimated, kind="stable")[: 2 * k]
    return Agreement(
        spearman=float(stats.spearmanr(estimated, exact).statistic),
        recall=float(np.isin(truth, found).mean()),
        num_genes=num,
    )
