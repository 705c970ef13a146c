"""The genes' own differences between start and goal, and what their covariance among untreated cells predicts.

These are the controls that need no model. They are read from raw counts: of at most `MAX_CELLS` cells of a state, balanced over
donors, log(1 + 10,000 * count / depth). Where no counts can be read, differential expression comes from the sentences: a gene's rank
score in a cell is 1 - rank / (number of genes in the sentence), 0 where the sentence lacks it. There is then no covariance control.

| column | is |
|---|---|
| `de_statistic` | Welch's t of the values, goal against start, over cells: a ranking, no test |
| `de_log_fold` | log2 ratio of mean counts per 10,000 (of mean rank scores) |
| `covariance` | correlation, among start cells and within donors, of the gene with the goal axis, the gene itself left out |

The goal axis is the difference of the mean values of goal and start. A linear system that a gene pushes responds along its
covariance, so `covariance` is the linear response to more of the gene. It uses no goal cell but for the axis.

Letters: S species, V vocabulary, N cells, G genes of a species.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from mixgf.arrays import Float64s, Ints
from mixgf.corpus.packed import token_positions
from mixgf.corpus.reader import Corpus
from mixgf.stats.donors import welch

MAX_CELLS = 2000
"""Most cells of a state whose counts are read."""
MIN_CELLS = 10
"""Fewest cells of a species on either side."""
PSEUDO_SCORE, PSEUDO_COUNT = 0.01, 0.01
"""Added to mean rank scores, and to mean counts per 10,000, before their ratio."""
_TARGET = 1e4
"""Counts to which every cell is scaled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """Figures of every token, by species; NaN where a species has too few cells or the token is of no gene of it."""

    species: tuple[str, ...]
    t_SV: Float64s
    fold_SV: Float64s
    covariance_SV: Float64s | None
    """None = made without counts."""

    @property
    def origin(self) -> str:
        """What the figures were made of, in words."""
        if self.covariance_SV is None:
            return "rank scores of sentences, 1 - rank / length, Welch's t over all cells of goal against start"
        return f"raw counts, log(1 + 10,000 count / depth), Welch's t over at most {MAX_CELLS:,} cells of goal and of start"


@dataclass(frozen=True, kw_only=True, eq=False)
class StateCounts:
    """Raw counts of cells of one state and species, over the genes of the species."""

    counts_NG: sparse.csr_matrix
    donor_N: Ints


def of_ranks(corpus: Corpus, start: Ints, goal: Ints, *, block: int = 2048) -> Expression:
    """Differential expression by rank scores over all cells of both states, read block by block."""
    sides = [_rank_scores(corpus, cells, block) for cells in (start, goal)]
    num = np.array([[len(start)], [len(goal)]], dtype=np.float64)
    mean, variance = (np.stack(values) for values in zip(*sides, strict=True))
    t_V = welch(np.broadcast_to(num, mean.shape), mean, variance)
    fold_V = np.log2((mean[1] + PSEUDO_SCORE) / (mean[0] + PSEUDO_SCORE))
    both = (np.tile(values, (len(corpus.species), 1)) for values in (t_V, fold_V))
    t_SV, fold_SV = both
    return Expression(species=tuple(corpus.species), t_SV=t_SV, fold_SV=fold_SV, covariance_SV=None)


def of_counts(corpus: Corpus, states: dict[str, tuple[StateCounts, StateCounts]]) -> Expression:
    """Differential expression and covariance of raw counts.

    Args:
        corpus: of the vocabulary.
        states: start and goal by species.
    """
    shape = (len(corpus.species), corpus.vocabulary.size)
    t_SV, fold_SV, covariance_SV = (np.full(shape, np.nan) for _ in range(3))
    for name, (start, goal) in states.items():
        if min(start.counts_NG.shape[0], goal.counts_NG.shape[0]) < MIN_CELLS:
            continue
        at = corpus.species.index(name), corpus.vocabulary.species_genes(name).tokens.astype(np.int64)
        t_SV[at], fold_SV[at] = differential(start.counts_NG, goal.counts_NG)
        start_NG, goal_NG = (log_normalised(side.counts_NG) for side in (start, goal))
        axis_G = np.asarray(goal_NG.mean(axis=0) - start_NG.mean(axis=0))
        covariance_SV[at] = axis_correlation(start_NG, axis_G.ravel(), start.donor_N)
    return Expression(species=tuple(corpus.species), t_SV=t_SV, fold_SV=fold_SV, covariance_SV=covariance_SV)


def log_normalised(counts_NG: sparse.csr_matrix) -> sparse.csr_matrix:
    """log(1 + 10,000 * count / depth), float64; a cell without counts stays empty."""
    scaled = per_ten_thousand(counts_NG)
    scaled.data = np.log1p(scaled.data)
    return scaled


def per_ten_thousand(counts_NG: sparse.csr_matrix) -> sparse.csr_matrix:
    """Counts scaled to the same sum in every cell, float64."""
    scaled = sparse.csr_matrix(counts_NG, dtype=np.float64, copy=True)
    depth_N = np.asarray(scaled.sum(axis=1)).ravel()
    scaled.data *= np.repeat(_TARGET / np.maximum(depth_N, 1), np.diff(scaled.indptr))
    return scaled


def moments(x_NG: sparse.csr_matrix) -> tuple[Float64s, Float64s]:
    """Mean and variance (over N, not N - 1) of each column, (G,) each."""
    mean_G = np.asarray(x_NG.mean(axis=0)).ravel()
    squares_G = np.asarray(x_NG.multiply(x_NG).mean(axis=0)).ravel()
    return mean_G, np.maximum(squares_G - mean_G**2, 0)


def differential(start_NG: sparse.csr_matrix, goal_NG: sparse.csr_matrix) -> tuple[Float64s, Float64s]:
    """Welch's t of log-normalised counts, goal against start, and log2 ratio of mean counts per 10,000, (G,) each."""
    sides = [log_normalised(start_NG), log_normalised(goal_NG)]
    num = np.array([[side.shape[0]] for side in sides], dtype=np.float64)
    mean, spread = (np.stack(values) for values in zip(*map(moments, sides), strict=True))
    variance = spread * num / np.maximum(num - 1, 1)
    t_G = welch(np.broadcast_to(num, mean.shape), mean, variance)
    plain = [np.asarray(per_ten_thousand(counts).mean(axis=0)).ravel() for counts in (start_NG, goal_NG)]
    return t_G, np.log2((plain[1] + PSEUDO_COUNT) / (plain[0] + PSEUDO_COUNT))


def axis_correlation(x_NG: sparse.csr_matrix, axis_G: Float64s, donor_N: Ints) -> Float64s:
    """Correlation of each gene with the cells' values along an axis from which the gene is left out, within donors, (G,).

    Args:
        x_NG: values of the cells.
        axis_G: weight of each gene.
        donor_N: donor of each cell; each donor's mean is taken away.

    Returns:
        NaN for genes that do not vary.
    """
    along_N = np.asarray(x_NG @ axis_G).ravel()
    donors, code_N = np.unique(donor_N, return_inverse=True)
    size_C = np.bincount(code_N, minlength=len(donors)).astype(np.float64)
    along_N -= (np.bincount(code_N, weights=along_N, minlength=len(donors)) / size_C)[code_N]
    member_CN = sparse.csr_matrix((np.ones(len(code_N)), (code_N, np.arange(len(code_N)))))
    mean_CG = np.asarray((member_CN @ x_NG).todense()) / size_C[:, None]
    squares_G = np.asarray(x_NG.multiply(x_NG).sum(axis=0)).ravel()
    own_G = squares_G - size_C @ mean_CG**2
    own_G = np.where(own_G > 1e-9 * np.maximum(squares_G, 1e-300), own_G, np.nan)
    shared_G = np.asarray(along_N @ x_NG).ravel()
    without_G = along_N @ along_N - 2 * axis_G * shared_G + axis_G**2 * own_G
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(without_G > 0, (shared_G - axis_G * own_G) / np.sqrt(own_G * without_G), np.nan)


def _rank_scores(corpus: Corpus, cells: Ints, block: int) -> tuple[Float64s, Float64s]:
    """Mean and variance of the rank score of every token over cells, (V,) each."""
    size = corpus.vocabulary.size
    total_V, squares_V = np.zeros(size), np.zeros(size)
    lead = int(corpus.cls)
    for part in np.array_split(cells, max(1, -(-len(cells) // block))):
        ids_T, offsets_B1 = corpus.tokens(part)
        lengths_B = np.diff(offsets_B1)
        rank_T = token_positions(offsets_B1) - lead
        score_T = np.where(rank_T >= 0, 1 - rank_T / np.repeat(lengths_B - lead, lengths_B), 0.0)
        total_V += np.bincount(ids_T, weights=score_T, minlength=size)
        squares_V += np.bincount(ids_T, weights=score_T**2, minlength=size)
    num = len(cells)
    mean_V = total_V / num
    return mean_V, np.maximum(squares_V - num * mean_V**2, 0) / max(num - 1, 1)
