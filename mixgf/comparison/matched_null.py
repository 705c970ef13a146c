"""Null distribution for a similarity of orthologs: permute them among genes of similar rank, coverage or frequency.

Letters: G pairs of orthologs, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats as scipy_stats

from mixgf.arrays import Float64s, Ints

BIN = 8
"""Fewest genes in a bin."""

MIN_PAIRS = 2 * BIN
"""Fewest pairs of orthologs for which a result is reported."""


def similar_gene_bins(features_GF: Float64s, size: int = BIN) -> Ints:
    """Number of each gene's bin, (G,): genes are halved by one feature after the other while both halves have `size` genes."""
    ranks = np.stack([scipy_stats.rankdata(column, method="ordinal") for column in features_GF.T], axis=1)
    open_, done = [(np.arange(len(ranks)), 0)], []
    while open_:
        rows, turn = open_.pop()
        if len(rows) < 2 * size:
            done.append(rows)
            continue
        order = rows[np.argsort(ranks[rows, turn % ranks.shape[1]], kind="stable")]
        open_ += [(half, turn + 1) for half in (order[len(order) // 2 :], order[: len(order) // 2])]
    bins_G = np.empty(len(ranks), dtype=np.int64)
    for number, rows in enumerate(done):
        bins_G[rows] = number
    return bins_G


def permute_within_bins(bins_G: Ints, rng: np.random.Generator) -> Ints:
    """A random permutation of the genes within their bins, (G,)."""
    order = np.lexsort((rng.random(len(bins_G)), bins_G))
    out_G = np.empty(len(bins_G), dtype=np.int64)
    out_G[np.argsort(bins_G, kind="stable")] = order
    return out_G


def quantile_interval(draws: list[float]) -> tuple[float, float]:
    """95 % interval by quantiles of the draws; NaN where all draws are NaN."""
    low, high = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return float(low), float(high)


def rank_sums(features: Sequence[Sequence[Float64s]]) -> Float64s:
    """Features of both species as one, (G, F): sums over species of the rank of each gene."""
    return np.stack([sum(map(scipy_stats.rankdata, both)) for both in features], axis=1)


def permutation_p(value: float, nulls: list[float]) -> float:
    """One-sided p: share of null values at least as high, the value itself counted; NaN for a value of NaN."""
    return (1 + sum(n >= value for n in nulls)) / (1 + len(nulls)) if np.isfinite(value) else float("nan")
