"""After a screen: choose the genes for exact scoring and their comparison genes, and check the estimates.

A random sample of genes is scored exactly, whatever their estimates, to check the estimates without selection bias. The
best genes are not compared with each other, as all were chosen for being extreme. They are compared with matched genes,
drawn at random among all genes of like rank and coverage.

Letters: P (cell, gene) pairs, K genes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

STRATA = 5
"""Number of quantile classes of each feature; genes of one class count as alike."""
TOP_SHARE = 0.1
"""Share of the sample that counts as its top; recall looks for it among twice as many of the best estimates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortlist:
    """Numbers of genes, in the order of exact scoring: sample, top, matched, rest."""

    sample: NDArray[np.int64]
    """Random sample."""
    top: NDArray[np.int64]
    """Best by estimate, best first, without the sample."""
    matched: NDArray[np.int64]
    """Drawn to be like the best, without those in sample or top."""
    rest: NDArray[np.int64]
    drawn: NDArray[np.int64]
    """All genes drawn without regard to their estimates: sample, matched, and the best that were drawn as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How well the estimates rank the genes of the sample."""

    spearman: float
    """Rank correlation of estimated and exact shifts; NaN = one of them is constant."""
    recall: float
    """Share of the exact top among twice as many of the best estimates."""
    num_genes: int

    def reaches(self, least: float) -> bool:
        """Whether the rank correlation is at least `least`; False for NaN."""
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
    """Choose genes by their best rank in any operation and direction.

    Args:
        estimate_OK: estimated shift of every gene by operation; NaN = no estimate. Sets of genes have none and are always scored.
        features_KF: features in which matched genes resemble the best ones; NaN for sets.
        top: number of genes per operation to score exactly, besides the sample.
        sample: number of genes to draw at random among those with an estimate.
        nulls: number of matched genes to draw.
        direction: `towards` the goal (highest estimates), `away` from it (lowest), or `both`, half of `top` each.
        rng: source of the draws.
    """
    tails = {"towards": [estimate_OK], "away": [-estimate_OK], "both": [estimate_OK, -estimate_OK]}[direction]
    top, estimate_OK = -(-top // len(tails)), np.concatenate(tails)
    num = estimate_OK.shape[1]
    some_K = np.isfinite(estimate_OK).any(axis=0)
    drawn = np.sort(rng.choice(np.flatnonzero(some_K), min(sample, int(some_K.sum())), replace=False)).astype(np.int64)
    order_OK = np.argsort(-np.nan_to_num(estimate_OK, nan=-np.inf), axis=1, kind="stable")
    place_OK = np.empty_like(order_OK)
    np.put_along_axis(place_OK, order_OK, np.broadcast_to(np.arange(num), order_OK.shape), axis=1)
    set_K = ~np.isfinite(features_KF).all(axis=1)
    place_K = np.where(
        some_K, place_OK.min(axis=0), np.where(set_K, -1, num)
    )  # genes that no screened cell has are last
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
    """At most `num` random genes, distributed over the strata of the features like the wanted ones.

    Strata are quantile classes, `STRATA` by feature. Within a stratum all genes are equally likely, wanted ones included,
    so that the drawn genes represent the stratum. Genes in `taken` are never drawn.
    """
    usable = np.flatnonzero(np.isfinite(features_KF).all(axis=1))
    if not (num and len(wanted) and len(usable)):
        return np.empty(0, dtype=np.int64)
    stratum_K = np.full(len(features_KF), -1)
    places = [stats.rankdata(column) for column in features_KF[usable].T]
    codes = [((place - 0.5) * STRATA // len(usable)).astype(np.int64) for place in places]
    stratum_K[usable] = np.ravel_multi_index(codes, (STRATA,) * len(codes))
    names, counts = np.unique(stratum_K[wanted][stratum_K[wanted] >= 0], return_counts=True)
    ends = np.round(np.cumsum(counts) / counts.sum() * num).astype(np.int64)  # rounded so that they add up to num
    drawn = []
    for name, share in zip(names.tolist(), np.diff(ends, prepend=0).tolist(), strict=True):
        free = np.setdiff1d(np.flatnonzero(stratum_K == name), taken)
        drawn.append(rng.choice(free, min(share, len(free)), replace=False))
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def estimate_agreement(estimate_K: NDArray[np.float64], exact_K: NDArray[np.float64]) -> Agreement:
    """Agreement of estimated and exact shifts of the same genes; genes without both are left out."""
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
