"""What a sceptic would run instead of the model, on the same splits.

Every baseline gets raw counts and training labels, and returns class probabilities of the test cells. Genes, scales, components
and weights are fitted on training cells only. Between species, counts are first put in the space of one-to-one orthologs and
every feature is z-scored within its species; that uses the test cells' counts (as anyone would have them), never their labels.

Shape letters: N training cells, M test cells, G genes, H chosen genes, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse, special, stats
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mixgf.arrays import Floats, Ints, Names

TARGET_DEPTH = 10_000
NUM_COMPONENTS = 50
MAX_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One split, as baselines see it: counts in one gene space, and the labels of the training cells."""

    train: sparse.csr_matrix
    """Raw counts (N, G)."""
    test: sparse.csr_matrix
    """Raw counts (M, G)."""
    labels: Ints
    """Class ids (N,), each class at least once."""
    num_classes: int
    train_species: Names
    """Species of each training cell (N,)."""
    test_species: Names
    num_hvgs: int = 2000
    num_neighbours: int = 5
    seed: int = 0

    @property
    def across(self) -> bool:
        """Whether cells of more than one species meet, so that features are z-scored within species."""
        return len(np.union1d(self.train_species, self.test_species)) > 1


Baseline = Callable[[Problem], Floats]
"""Class probabilities (M, C)."""


# features


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
    """Normal scores of each gene's rank within its cell (Souza & Mehta 2026, after scTOP), for some columns: (cells, H).

    Genes with equal counts, above all those with none, share their mean rank. No parameter and no other cell takes part.
    """
    out = np.empty((counts.shape[0], len(columns)), dtype=np.float32)
    for i in range(counts.shape[0]):
        row = np.asarray(counts[i].todense()).ravel()
        out[i] = special.ndtri((stats.rankdata(row)[columns] - 0.5) / len(row))
    return out


def standardise(train: Floats, test: Floats, train_groups: Names, test_groups: Names) -> tuple[Floats, Floats]:
    """Z-score columns within groups (species); a test group that was trained on takes the training cells' scale.

    A test group without training cells is scaled by itself, labels unseen. Columns that do not vary become 0.
    """
    train_out, test_out = np.empty_like(train), np.empty_like(test)
    for group in np.union1d(train_groups, test_groups):
        fitted = train[train_groups == group] if (train_groups == group).any() else test[test_groups == group]
        mean, sd = fitted.mean(0), fitted.std(0)
        scale = np.divide(1, sd, out=np.zeros_like(sd), where=sd > 1e-8)
        train_out[train_groups == group] = (train[train_groups == group] - mean) * scale
        test_out[test_groups == group] = (test[test_groups == group] - mean) * scale
    return train_out, test_out


def _expression(problem: Problem) -> tuple[Floats, Floats]:
    """Standardised log expression of the variable genes."""
    train, test = log_normalise(problem.train), log_normalise(problem.test)
    genes = variable_genes(train, problem.num_hvgs)
    groups = (problem.train_species, problem.test_species) if problem.across else one_group(train, test)
    return standardise(train[:, genes].toarray(), test[:, genes].toarray(), *groups)


def _components(train: Floats, test: Floats, seed: int) -> tuple[Floats, Floats]:
    number = min(NUM_COMPONENTS, *train.shape)
    pca = PCA(number, svd_solver="randomized", random_state=seed).fit(train)
    return pca.transform(train), pca.transform(test)


def expression_space(counts: sparse.csr_matrix, num_hvgs: int, seed: int) -> Floats:
    """50 principal components of the standardised variable genes of some cells (N, 50), without any label."""
    logged = log_normalise(counts)
    genes = variable_genes(logged, num_hvgs)
    dense = logged[:, genes].toarray()
    scaled, _ = standardise(dense, dense[:0], *one_group(dense, dense[:0]))
    return _components(scaled, scaled[:1], seed)[0]


def one_group(train: Floats | sparse.csr_matrix, test: Floats | sparse.csr_matrix) -> tuple[Names, Names]:
    """Group names that put all cells in one group."""
    return np.full(train.shape[0], "all"), np.full(test.shape[0], "all")


# classifiers, also used on embeddings


def logistic(train: Floats, labels: Ints, test: Floats, num_classes: int) -> Floats:
    """Multinomial logistic regression (ridge, C = 1, L-BFGS): probabilities (M, C)."""
    fitted = _fit(train, labels)
    return _aligned(fitted.predict_proba(test), fitted.classes_, num_classes)


def logistic_layer(train: Floats | sparse.csr_matrix, labels: Ints, num_classes: int) -> tuple[Floats, Floats]:
    """The same fit as a layer, weights (C, H) and bias (C,), whose softmax is `logistic`'s probability.

    Args:
        train: Features.
        labels: Class ids, each class at least once.
        num_classes: C.
    """
    fitted = _fit(train, labels)
    assert len(fitted.classes_) == num_classes, "every class has a training cell"
    if num_classes > 2:
        return fitted.coef_, fitted.intercept_
    zeros = np.zeros_like(fitted.coef_)  # two classes have one row: the second against the first
    return np.concatenate([zeros, fitted.coef_]), np.concatenate([np.zeros(1), fitted.intercept_])


def _fit(train: Floats | sparse.csr_matrix, labels: Ints) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the limit on iterations is part of the method
        return LogisticRegression(max_iter=MAX_ITERATIONS).fit(train, labels)


def neighbours(train: Floats, labels: Ints, test: Floats, num_classes: int, *, number: int, metric: str) -> Floats:
    """K nearest neighbours: share of each class among them (M, C); ties go to the class that comes first."""
    fitted = KNeighborsClassifier(min(number, len(train)), metric=metric, algorithm="brute").fit(train, labels)
    return _aligned(fitted.predict_proba(test), fitted.classes_, num_classes)


def centroids(train: Floats, labels: Ints, test: Floats, num_classes: int, *, temperature: float = 0.1) -> Floats:
    """Nearest class mean by cosine: softmax of cosine / temperature (M, C); not calibrated."""
    sums = np.stack([train[labels == c].mean(0) for c in range(num_classes)])
    return special.softmax(unit(test) @ unit(sums).T / temperature, axis=1)


def unit(rows: Floats) -> Floats:
    """Rows scaled to length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def _aligned(probabilities: Floats, classes: Ints, num_classes: int) -> Floats:
    out = np.zeros((len(probabilities), num_classes))
    out[:, classes] = probabilities
    return out


# the baselines


def majority(problem: Problem) -> Floats:
    """Every cell gets the class frequencies of the training cells."""
    shares = np.bincount(problem.labels, minlength=problem.num_classes) / len(problem.labels)
    return np.tile(shares, (problem.test.shape[0], 1))


def hvg_logreg(problem: Problem) -> Floats:
    """Logistic regression on log-normalised, standardised variable genes."""
    train, test = _expression(problem)
    return logistic(train, problem.labels, test, problem.num_classes)


def pca_knn(problem: Problem) -> Floats:
    """K nearest neighbours on 50 principal components of the same."""
    train, test = _components(*_expression(problem), problem.seed)
    return neighbours(
        train, problem.labels, test, problem.num_classes, number=problem.num_neighbours, metric="euclidean"
    )


def pseudobulk(problem: Problem) -> Floats:
    """Nearest class mean, by cosine, on standardised variable genes."""
    train, test = _expression(problem)
    return centroids(train, problem.labels, test, problem.num_classes)


def rank_pca(problem: Problem) -> Floats:
    """Within-cell rank normal scores of the variable genes, 50 principal components, logistic regression."""
    genes = variable_genes(log_normalise(problem.train), problem.num_hvgs)
    train, test = rank_scores(problem.train, genes), rank_scores(problem.test, genes)
    if problem.across:
        train, test = standardise(train, test, problem.train_species, problem.test_species)
    train, test = standardise(*_components(train, test, problem.seed), *one_group(train, test))
    return logistic(train, problem.labels, test, problem.num_classes)


BASELINES: dict[str, Baseline] = {
    "majority": majority,
    "hvg_logreg": hvg_logreg,
    "pca_knn": pca_knn,
    "pseudobulk": pseudobulk,
    "rank_pca": rank_pca,
}
"""Name in `classify.models` to function; a further baseline is one more entry."""
