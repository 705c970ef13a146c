"""The convex head: scales of the encoder do not matter, genes that tell types apart are found, a useless vector is put aside."""

import numpy as np
import pytest
import torch
from scipy import sparse, special

from mixgf.classification import linear_start
from mixgf.encoder.bert import rank_weight

N, V = 90, 40


def problem(seed: int = 0) -> tuple[np.ndarray, sparse.csr_matrix, np.ndarray]:
    """Three types; each cell has 9 of 30 common genes and 1 of its type's 3 own genes; the vectors are noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(N) % 3
    tokens, offsets = [], [0]
    for label in labels:
        own = 30 + 3 * label + rng.choice(3, 1)
        tokens.append(np.concatenate([rng.choice(30, 9, replace=False), own]))
        offsets.append(offsets[-1] + 10)
    genes = linear_start.gene_rows(np.concatenate(tokens).astype(np.int32), np.array(offsets), V)
    return rng.normal(size=(N, 20)), genes, labels


def test_rows_have_length_one_and_fall_with_the_logarithm_of_the_rank() -> None:
    """By hand: the first gene counts 2, the second 2 - ln 2 / ln 257; of two genes that is the ratio of a row of length 1."""
    rows = linear_start.gene_rows(np.array([3, 1, 2], dtype=np.int32), np.array([0, 2, 3, 3]), 5).toarray()
    second = 2 - np.log(2) / np.log(257)
    np.testing.assert_allclose(rows, [[0, second, 0, 2, 0] / np.hypot(2, second), [0, 0, 1, 0, 0], [0] * 5])
    long = linear_start.gene_rows(np.arange(300, dtype=np.int32), np.array([0, 300]), 300).toarray()[0]
    assert long[256] / long[0] == pytest.approx(0.5)
    np.testing.assert_allclose(rank_weight(torch.arange(300)), rank_weight(np.arange(300)), rtol=1e-6)


@pytest.mark.parametrize("genes", [False, True])
def test_units_and_offset_of_the_vectors_do_not_matter(*, genes: bool) -> None:
    vectors, rows, labels = problem()
    vectors[np.arange(N), labels] += 2
    used = rows if genes else None
    unit = 10.0 ** np.linspace(-3, 3, 20)
    base, other = (
        linear_start.fit(vectors, used, labels, 3),
        linear_start.fit(vectors * unit + 5 * unit, used, labels, 3),
    )
    np.testing.assert_allclose(
        special.softmax(other.logits(vectors * unit + 5 * unit, used), axis=1),
        special.softmax(base.logits(vectors, used), axis=1),
        atol=1e-3,
    )
    assert other.loss == pytest.approx(base.loss, rel=1e-2)


def test_it_is_the_penalised_optimum() -> None:
    """An independent optimiser (torch, full gradients) finds the same probabilities for the same objective."""
    vectors, rows, labels = problem()
    vectors[np.arange(N), labels] += 1
    found = linear_start.fit(vectors, rows, labels, 3, share=0.1)
    dense = rows.toarray()
    x = np.hstack([
        (vectors - vectors.mean(0)) / vectors.std(0) * (linear_start.STRENGTH * 0.1 / 20) ** 0.5,
        dense * (linear_start.STRENGTH / dense.var(0).sum()) ** 0.5,
    ])  # fmt: skip
    X, y = torch.from_numpy(x), torch.from_numpy(labels)
    w, b = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 60), (3,)))
    optimizer = torch.optim.LBFGS([w, b], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(X @ w.T + b, y, reduction="sum") + 0.5 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.softmax(X @ w.T + b, 1).detach().numpy()
    np.testing.assert_allclose(special.softmax(found.logits(vectors, rows), axis=1), expected, atol=1e-3)
    assert found.loss == pytest.approx(-np.log(expected[np.arange(N), labels]).mean(), rel=1e-2)


def test_genes_of_a_type_get_the_weights() -> None:
    vectors, rows, labels = problem()
    found = linear_start.fit(vectors, rows, labels, 3, share=0.01)
    for label in range(3):
        assert set(np.argsort(-found.genes_CV[label])[:3]) == set(range(30 + 3 * label, 33 + 3 * label))


def test_a_useless_vector_is_put_aside_and_a_useful_one_is_not() -> None:
    vectors, rows, labels = problem()
    assert linear_start.fit_best(vectors, rows, labels, 3, seed=0).share < 1
    useful = vectors * 0.1
    useful[np.arange(N), labels] += 1
    blind = linear_start.gene_rows(np.tile(np.arange(10, dtype=np.int32), N), np.arange(N + 1) * 10, V)
    blind.indices[:] = np.random.default_rng(1).permuted(np.tile(np.arange(V), (N, 1)), axis=1)[:, :10].ravel()
    assert linear_start.fit_best(useful, blind, labels, 3, seed=0).share == 1


def test_folds_have_every_type_on_the_side_that_is_fitted() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2])
    fold = linear_start.folds(labels, 0)
    assert fold[-1] == -1
    for k in range(linear_start.FOLDS):
        assert set(labels[fold != k]) == {0, 1, 2}
    assert sorted(np.bincount(fold[:7], minlength=3).tolist()) == [2, 2, 3]


def test_two_types_are_a_head_of_two_rows() -> None:
    vectors, rows, labels = problem()
    found = linear_start.fit(vectors, rows, labels % 2, 2)
    assert found.head_CD.shape == (2, 20)
    assert found.genes_CV.shape == (2, V)


def test_scores_that_are_three_times_too_sure_are_divided_by_three() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20_000, 4)) * 2
    labels = (special.softmax(z, axis=1).cumsum(1) < rng.random((len(z), 1))).sum(1)
    assert linear_start._best_factor(3 * z, labels) == pytest.approx(1 / 3, rel=0.05)


def test_the_scores_of_the_best_fit_are_those_of_the_fit_times_a_number() -> None:
    """The number is not 1, and it makes cells left out more likely: the mean loss of folds is lower with it than without."""
    vectors, rows, labels = problem()
    labels = np.where(np.random.default_rng(2).random(N) < 0.3, (labels + 1) % 3, labels)
    found = linear_start.fit_best(vectors, rows, labels, 3, seed=0)
    plain = linear_start.fit(vectors, rows, labels, 3, share=found.share)
    ratio = found.logits(vectors, rows) / plain.logits(vectors, rows)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    fold = linear_start.folds(labels, 0)
    losses = np.zeros(2)
    for k in range(linear_start.FOLDS):
        out = fold == k
        made = linear_start.fit(vectors[~out], rows[~out], labels[~out], 3, share=found.share)
        scores = made.logits(vectors[out], rows[out])
        losses += [linear_start._loss(scores, labels[out]), linear_start._loss(ratio[0, 0] * scores, labels[out])]
    assert losses[1] < losses[0] - 0.1
