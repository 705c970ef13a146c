"""The class head that a fine-tuning starts from: logistic regression on the untouched encoder's vectors and on genes.

There are two blocks of features: the encoder's vector, z-scored, and the genes of the sentence, weighted by rank. Each block has a
total variance of 1 over the training cells; the vector's is then multiplied by a share that cross-validation chooses. For a given
share the problem is convex: the result depends on no step size, order of cells or seed. Linear probing before fine-tuning: Kumar et
al. 2022. A linear model beside a deep one: Cheng et al. 2016.

Shapes: N training cells, D width of a vector, V vocabulary, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse, special

from mixgf.arrays import Floats, Integers
from mixgf.classification.simple_classifiers import logistic_regression
from mixgf.corpus import packed
from mixgf.encoder.bert import rank_weight

STRENGTH = 1000.0
"""scikit-learn's `C` for blocks of variance 1. For sentences of 256 genes it is about C = 5 on indicators of 0 and 1."""
SHARES = (1.0, 0.1, 0.01)
"""Shares of the vector's block that are tried where genes take part."""
FOLDS = 3


@dataclass(frozen=True, eq=False)
class Start:
    """A linear layer on raw vectors, and a weight per class and token."""

    head_CD: Floats
    bias_C: Floats
    genes_CV: Floats
    """Weights of `gene_rows`; no columns where genes take no part."""
    share: float
    """Share of the vector's block."""
    loss: float
    """Mean cross entropy of the training cells."""

    def logits(self, vectors_ND: Floats, genes_NV: sparse.csr_matrix | None) -> Floats:
        """Class scores (N, C)."""
        out = vectors_ND @ self.head_CD.T + self.bias_C
        return out if genes_NV is None else out + genes_NV @ self.genes_CV.T


def gene_rows(tokens_T: npt.NDArray[np.int32], offsets_N1: npt.NDArray[np.int64], vocab_size: int) -> sparse.csr_matrix:
    """Tokens of each sentence, weighted by `rank_weight`: rows (N, V), scaled to length 1."""
    weights_T = rank_weight(packed.token_positions(offsets_N1))
    rows_NV = sparse.csr_matrix((weights_T, tokens_T, offsets_N1), shape=(len(offsets_N1) - 1, vocab_size))
    lengths_N = np.sqrt(np.asarray(rows_NV.multiply(rows_NV).sum(1)).ravel())
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(lengths_N, 1e-9)) @ rows_NV)


def fit(
    vectors_ND: Floats, genes_NV: sparse.csr_matrix | None, labels_N: Integers, num_classes: int, *, share: float = 1.0
) -> Start:
    """The head with the highest penalised likelihood (logistic regression).

    Args:
        vectors_ND: Vectors of the encoder; no columns = genes only.
        genes_NV: Rows of `gene_rows`; None = genes take no part.
        labels_N: Class ids, each class at least once.
        num_classes: C.
        share: Share of the vector's block.
    """
    D = vectors_ND.shape[1]
    mean_D, sd_D = vectors_ND.mean(0, dtype=np.float64), vectors_ND.std(0, dtype=np.float64)
    by_D = np.divide((STRENGTH * share / max(D, 1)) ** 0.5, sd_D, out=np.zeros(D), where=sd_D > 1e-8)
    features, used, by_genes = (vectors_ND - mean_D) * by_D, np.empty(0, dtype=np.int64), 1.0
    if genes_NV is not None:
        used = np.flatnonzero(np.bincount(genes_NV.indices, minlength=genes_NV.shape[1]))
        mine = genes_NV[:, used]
        spread = np.asarray(mine.multiply(mine).mean(0) - np.square(mine.mean(0))).sum()
        by_genes = (STRENGTH / max(float(spread), 1e-9)) ** 0.5
        features = sparse.hstack([sparse.csr_matrix(features), mine * by_genes], format="csr")
    layer = logistic_regression(features, labels_N.astype(np.int64), num_classes)
    weights, bias_C = layer.weights_CH, layer.bias_C
    head_CD = weights[:, :D] * by_D
    genes_CV = np.zeros((num_classes, 0 if genes_NV is None else genes_NV.shape[1]))
    genes_CV[:, used] = weights[:, D:] * by_genes
    loss = _loss(features @ weights.T + bias_C, labels_N)
    return Start(head_CD=head_CD, bias_C=bias_C - head_CD @ mean_D, genes_CV=genes_CV, share=share, loss=loss)


def fit_best(
    vectors_ND: Floats, genes_NV: sparse.csr_matrix | None, labels_N: Integers, num_classes: int, *, seed: int,
    shares: tuple[float, ...] = SHARES,
) -> Start:  # fmt: skip
    """`fit` with the share of `shares` that predicts most left-out cells correctly, in `FOLDS` folds stratified by type.

    Of shares that are equally good the largest is taken. Accuracy decides, not the loss, because the loss also depends on how large
    the weights are. The scores are then multiplied by the factor with the lowest loss on the left-out cells, so that the loss of
    later epochs can be compared with theirs.
    """
    fold_N = folds(labels_N, seed)
    best: tuple[int, float, Floats] | None = None
    for share in shares if genes_NV is not None else (1.0,):
        logits_NC = np.zeros((len(labels_N), num_classes))
        for fold in np.unique(fold_N[fold_N >= 0]):
            out, rest = fold_N == fold, fold_N != fold
            genes = (None, None) if genes_NV is None else (genes_NV[rest], genes_NV[out])
            made = fit(vectors_ND[rest], genes[0], labels_N[rest], num_classes, share=share)
            logits_NC[out] = made.logits(vectors_ND[out], genes[1])
        right = int((logits_NC.argmax(1) == labels_N)[fold_N >= 0].sum())
        if best is None or right > best[0]:
            best = (right, share, logits_NC)
    assert best is not None
    tested = fold_N >= 0
    times = _best_factor(best[2][tested], labels_N[tested]) if tested.any() else 1.0
    made = fit(vectors_ND, genes_NV, labels_N, num_classes, share=best[1])
    loss = _loss(times * made.logits(vectors_ND, genes_NV), labels_N)
    return replace(
        made, head_CD=times * made.head_CD, bias_C=times * made.bias_C, genes_CV=times * made.genes_CV, loss=loss
    )


def _best_factor(logits_NC: Floats, labels_N: Integers) -> float:
    """The factor, between 1/20 and 20, at which the scores of left-out cells have the lowest loss."""

    def loss(log_factor: float) -> float:
        return _loss(np.exp(log_factor) * logits_NC, labels_N)

    bounds = (-float(np.log(20)), float(np.log(20)))
    return float(np.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))


def folds(labels_N: Integers, seed: int, number: int = FOLDS) -> Integers:
    """Fold of each cell (N,), drawn within types; -1 = never left out, for the only cell of a type."""
    fold_N = np.full(len(labels_N), -1, dtype=np.int64)
    rng = np.random.default_rng([seed, 11])
    for label in np.unique(labels_N):
        mine = rng.permutation(np.flatnonzero(labels_N == label))
        if len(mine) > 1:
            fold_N[mine] = np.arange(len(mine)) % number
    return fold_N


def _loss(logits_NC: Floats, labels_N: Integers) -> float:
    return float(-np.asarray(special.log_softmax(logits_NC, axis=1))[np.arange(len(labels_N)), labels_N].mean())
