"""After a screen: which genes are scored exactly, in which order, and whether the screen may be trusted.

The estimates are checked on genes drawn at random, which are scored exactly whatever their estimate: a check on the best ones
alone would be a check on the few that the screen itself chose.

Letters: P (cell, gene) pairs, K genes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

TOP_SHARE = 0.1
"""The share of the sample that counts as its top; it is looked for in twice as many of the best estimates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortlist:
    """Genes in the order in which they are scored exactly: the sample, the best by estimate, the rest."""

    sample: NDArray[np.int64]
    top: NDArray[np.int64]
    """Best first, less those of the sample."""
    rest: NDArray[np.int64]


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


def shortlist(estimate_OK: NDArray[np.float64], *, top: int, sample: int, rng: np.random.Generator) -> Shortlist:
    """Choose by estimate. A gene counts for its best place under any of the operations.

    Args:
        estimate_OK: estimated shift of every gene by operation, NaN = none: sets of genes, which are always scored.
        top: genes of each operation to score exactly besides the sample.
        sample: genes to draw among those with an estimate.
        rng: draws them.
    """
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
    return Shortlist(sample=drawn, top=order[chosen], rest=order[~chosen])


def agreement(estimate_K: NDArray[np.float64], exact_K: NDArray[np.float64]) -> Agreement:
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
