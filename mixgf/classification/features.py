"""Features of raw counts for baselines: normalised expression, variable genes, ranks, z-scores, principal components.

Everything that is fitted is fitted on training cells. The one exception is stated at `Scale`: cells of a species without training
cells are scaled by themselves, which uses their features and no label.

Shape letters: N cells, G genes, H chosen genes or features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, special, stats
from sklearn.decomposition import PCA

from mixgf.arrays import Floats, Ints, Names

TARGET_DEPTH = 10_000
"""Counts to which each cell is scaled."""
NUM_COMPONENTS = 50


def log_normalise(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """log(1 + counts per 10,000), cell by cell."""
    depth = np.asarray(counts.sum(1)).ravel()
    scale = np.divide(TARGET_DEPTH, depth, out=np.zeros(len(depth)), where=depth > 0)
    out = sparse.csr_matrix(sparse.diags(scale) @ counts, dtype=np.float32)
    out.data = np.log1p(out.data)
    return out


def variable_genes(logged: sparse.csr_matrix, number: int) -> Ints:
    """The most variable genes (column numbers, ascending), by dispersion normalised within bins of mean expression.

    Dispersion is variance over mean of counts per 10,000, on the log scale, z-scored in 20 bins of equal width of the log mean
    (Satija et al. 2015; scanpy's flavour `seurat`). Ties go to the lower column.

    Args:
        logged: log(1 + counts per 10,000) of the training cells.
        number: How many; all genes that are ever detected when fewer are.
    """
    linear = logged.copy()
    linear.data = np.expm1(linear.data.astype(np.float64))
    cells = linear.shape[0]
    mean = np.asarray(linear.mean(0)).ravel()
    square = np.asarray(linear.multiply(linear).mean(0)).ravel()
    variance = (square - mean**2) * cells / max(cells - 1, 1)
    detected = np.flatnonzero(mean > 0)
    log_mean = np.log1p(mean[detected])
    dispersion = np.log(np.maximum(variance[detected] / mean[detected], 1e-12))
    edges = np.linspace(log_mean.min(), log_mean.max(), 21)
    which = np.clip(np.searchsorted(edges, log_mean, side="left") - 1, 0, 19)
    size = np.bincount(which, minlength=20)
    centre = np.bincount(which, dispersion, minlength=20) / np.maximum(size, 1)
    spread = np.bincount(which, (dispersion - centre[which]) ** 2, minlength=20) / np.maximum(size - 1, 1)
    spread, centre = np.sqrt(spread), centre.copy()
    alone = size == 1  # a bin of one gene has no spread: its gene scores 1, as in scanpy
    spread[alone], centre[alone] = np.abs(centre[alone]), 0.0
    z = (dispersion - centre[which]) / np.where(spread[which] > 0, spread[which], 1.0)
    return np.sort(detected[np.argsort(-z, kind="stable")[:number]])


def rank_scores(counts: sparse.csr_matrix, columns: Ints) -> Floats:
    """Normal scores of each gene's rank within its cell (Souza & Mehta 2026, after scTOP), for some columns: (N, H).

    Genes with equal counts, above all those with none, share their mean rank. The method has no parameter and reads no other cell.
    """
    out = np.empty((counts.shape[0], len(columns)), dtype=np.float32)
    for i in range(counts.shape[0]):
        row = np.asarray(counts[i].todense()).ravel()
        out[i] = special.ndtri((stats.rankdata(row)[columns] - 0.5) / len(row))
    return out


@dataclass(frozen=True, eq=False)
class Scale:
    """Z-scores of feature columns within groups of cells (species), with the training cells' mean and standard deviation.

    A group without training cells is scaled by the mean and standard deviation of the given cells; no label is read. Columns
    that do not vary become 0.
    """

    groups: dict[str, tuple[Floats, Floats]]
    """Mean (H,) and reciprocal standard deviation (H,) of each group of training cells."""

    @classmethod
    def fit(cls, values_NH: Floats, groups_N: Names | None = None) -> Scale:
        """The scale of training cells; `groups_N` = None takes all cells as one group."""
        names_N = _one_group(values_NH) if groups_N is None else groups_N
        return cls({str(name): _moments(values_NH[names_N == name]) for name in np.unique(names_N)})

    def __call__(self, values_NH: Floats, groups_N: Names | None = None) -> Floats:
        """Z-scores (N, H) of cells of these groups."""
        names_N = _one_group(values_NH) if groups_N is None else groups_N
        out = np.empty_like(values_NH)
        for name in np.unique(names_N):
            mine = values_NH[names_N == name]
            mean_H, scale_H = self.groups[str(name)] if str(name) in self.groups else _moments(mine)
            out[names_N == name] = (mine - mean_H) * scale_H
        return out


def _moments(values_NH: Floats) -> tuple[Floats, Floats]:
    mean_H, sd_H = values_NH.mean(0), values_NH.std(0)
    return mean_H, np.divide(1, sd_H, out=np.zeros_like(sd_H), where=sd_H > 1e-8)


def _one_group(values_NH: Floats) -> Names:
    return np.full(values_NH.shape[0], "all")


def principal_components(train_NH: Floats, seed: int, number: int = NUM_COMPONENTS) -> Floats:
    """At most `number` principal components of centred features, as columns (H, K)."""
    few = min(number, *train_NH.shape)
    pca = PCA(few, svd_solver="randomized", random_state=seed).fit(train_NH)
    return np.ascontiguousarray(pca.components_.T)


def expression_space(counts: sparse.csr_matrix, num_hvgs: int, seed: int) -> Floats:
    """Principal components (N, 50) of the z-scored variable genes of some cells, without any label."""
    logged = log_normalise(counts)
    dense = logged[:, variable_genes(logged, num_hvgs)].toarray()
    scaled = Scale.fit(dense)(dense)
    return np.asarray(scaled @ principal_components(scaled, seed))
