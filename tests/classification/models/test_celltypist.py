"""CellTypist's way: genes of both rounds, probabilities of one type against the rest, and the vote, by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from mixgf.classification.models import celltypist
from mixgf.classification.models.celltypist import CellTypist, CellTypistVote
from mixgf.classification.models.protocol import CellSet, Problem
from mixgf.config.classification import Classify
from mixgf.config.run import Config


def problem(
    num_classes: int = 3, seed: int = 0, *, genes: int = 80, high: float = 3.0
) -> tuple[Problem[sparse.csr_matrix], np.ndarray]:
    """Types of 60 cells; each has ten genes that are `high` times as high. A third of the cells is predicted."""
    rng = np.random.default_rng(seed)
    labels = np.arange(60 * num_classes) % num_classes
    mean = np.where(np.arange(genes) // 10 == labels[:, None], high, 1.0)
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    train = np.arange(len(labels)) < 40 * num_classes
    made = Problem(
        config=Config(classify=Classify(num_hvgs=genes)), train=CellSet(counts[train], np.full(train.sum(), "human")),
        labels=labels[train], num_classes=num_classes, is_validation=np.zeros(train.sum(), dtype=bool),
        target=CellSet(counts[~train], np.full((~train).sum(), "human")),
    )  # fmt: skip
    return made, labels[~train]


def test_z_scores_are_of_training_cells_and_cut_at_ten_from_above_only() -> None:
    train = sparse.csr_matrix(np.array([[1, 1, 0], [3, 1, 0], [1, 1, 0]], dtype=np.float32))
    scores = celltypist.ZScores.fit(train)
    assert scores.genes_H.tolist() == [0, 1]  # the third gene is in no cell
    logged = np.log1p(10_000 * train.toarray() / train.toarray().sum(1, keepdims=True))[:, :2]
    np.testing.assert_allclose(scores(train), (logged - logged.mean(0)) / logged.std(0), rtol=2e-4)
    far = celltypist.ZScores(np.array([0]), np.array([0.0]), np.array([0.1]))
    assert far(train[:1]).tolist() == [[10.0]]
    assert celltypist.ZScores(np.array([0]), np.array([100.0]), np.array([0.1]))(train[:1])[0, 0] < -900


def test_the_second_round_reads_the_largest_weights_of_any_type() -> None:
    weights = np.array([[0.1, -5.0, 0.2, 0.0, 1.0], [3.0, 0.0, 0.1, -0.2, 1.0]])
    assert celltypist.top_genes(weights, 2).tolist() == [0, 1, 4]
    assert celltypist.top_genes(weights, 9).tolist() == [0, 1, 2, 3, 4]


def test_probabilities_have_the_order_of_the_odds_even_where_they_round_to_one() -> None:
    odds = np.array([[50.0, 60.0, -3.0], [0.0, 0.0, -800.0]])
    found = celltypist.one_against_rest(odds)
    np.testing.assert_allclose(found.sum(1), 1)
    assert found[0].argmax() == 1
    assert found[1] == pytest.approx([0.5, 0.5, 0.0], abs=1e-8)
    assert celltypist.one_against_rest(np.array([[-1.0, 1.0]]))[0, 1] == pytest.approx(1 / (1 + np.exp(-1.0)), abs=1e-8)


def test_a_cluster_takes_its_commonest_type() -> None:
    own = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    assert celltypist.vote(own, np.array([2, 2, 2, 0])).tolist() == [[2 / 3, 1 / 3]] * 3 + [[0, 1]]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_types_are_told_apart_and_the_vote_mends_single_cells(num_classes: int) -> None:
    """A fifth of the training labels is wrong, so that single cells are misread; their clusters are not."""
    right = []
    for seed in range(4):
        made, true = problem(num_classes, seed, high=6.0)
        labels = np.where(np.arange(len(made.labels)) % 5 == 0, (made.labels + 1) % num_classes, made.labels)
        made = replace(made, labels=labels)
        target = made.target[np.tile(np.arange(len(true)), 2)]  # more than 50 cells
        found = [kind().fit(made).predict(target).argmax(1) for kind in (CellTypist, CellTypistVote)]
        right.append([(one == np.tile(true, 2)).mean() for one in found])
    alone, voted = np.mean(right, axis=0)
    assert alone > 0.6
    assert voted > alone + 0.03
    few = target[:50]
    np.testing.assert_array_equal(CellTypistVote().fit(made).predict(few), CellTypist().fit(made).predict(few))


def test_one_type_alone_is_certain() -> None:
    made, _ = problem(1)
    assert (CellTypist().fit(made).predict(made.target) == 1).all()
