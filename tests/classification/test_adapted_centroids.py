"""Means that move towards another study: each type by itself, by as much as its cells count; types without cells stay."""

from dataclasses import replace

import numpy as np
import pytest
from invented_studies import PLATFORM, cells, problem

from mixgf.classification import simple_classifiers
from mixgf.classification.adapted_centroids import WEIGHT, adapted_centroids
from mixgf.classification.models.baselines import GenesVote
from mixgf.classification.simple_classifiers import unit

WIDTH = 40
RNG = np.random.default_rng(4)
MEANS = unit(RNG.normal(size=(4, WIDTH)))


def around(means: np.ndarray, each: int, *, noise: float = 0.12) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(len(means)), each)
    return unit(means[labels] + RNG.normal(0, noise, (len(labels), WIDTH))), labels


def fixed(train: np.ndarray, labels: np.ndarray) -> simple_classifiers.CentroidHead:
    return simple_classifiers.nearest_centroid(train, labels, labels.max() + 1, temperature=0.05)


def test_a_mean_moves_by_as_much_as_its_cells_count_and_a_type_without_cells_stays() -> None:
    train, labels = around(MEANS[:3], 30)
    study, _ = around(MEANS[3:], 10)
    head = adapted_centroids(train, labels, study, np.zeros(10, dtype=np.int64), 3, temperature=0.05)
    expected = (WEIGHT * train[:30].mean(0) + 10 * study.mean(0)) / (WEIGHT + 10)
    np.testing.assert_allclose(head.means_CH[0], unit(expected[None])[0], atol=1e-12)
    np.testing.assert_allclose(head.means_CH[1:], fixed(train, labels).means_CH[1:], atol=1e-12)


def test_types_that_each_differ_in_their_own_way_are_told_apart_by_moved_means() -> None:
    train, labels = around(MEANS, 40)
    elsewhere = unit(MEANS + RNG.normal(0, 0.17, MEANS.shape))  # each type is another in the study
    study, _ = around(elsewhere, 60, noise=0.2)
    still = fixed(train, labels)
    moved = adapted_centroids(train, labels, study, still(study).argmax(1), 4, temperature=0.05)
    new, true = around(elsewhere, 500, noise=0.2)  # other cells of the study
    accuracy = [(head(new).argmax(1) == true).mean() for head in (still, moved)]
    assert accuracy[1] > accuracy[0] + 0.02


def test_a_class_without_a_training_cell_has_probability_zero() -> None:
    train, labels = around(MEANS[:2], 20)
    study, said = around(MEANS[:2], 10)
    assert adapted_centroids(train, labels, study, said, 3, temperature=0.05)(study)[:, 2].max() == 0


def test_for_another_study_the_regression_keeps_half_of_the_vote_and_three_centroids_share_the_other() -> None:
    target, _ = cells((40, 40, 40), PLATFORM)

    def weights(**changes: object) -> list[float]:
        return [member.weight for member in GenesVote().fit(problem(target, **changes)).classifier.members]

    assert weights() == [1, *[pytest.approx(1 / 3)] * 3]
    assert weights(study="old") == weights(align=False) == [1, 1]
    made = problem(target)
    fitted = GenesVote().fit(made)
    z_scored = [bool(member.readings[0].deviations) for member in fitted.classifier.members]
    assert z_scored == [False, True, True, False]
    regression, *centroids = [member(made.target) for member in fitted.classifier.members]
    np.testing.assert_allclose(fitted.predict(made.target), (regression + np.mean(centroids, axis=0)) / 2, atol=1e-12)


@pytest.mark.parametrize("sizes", [(120, 0, 0), (0, 0, 90), (100, 8, 2)])
def test_a_study_of_one_type_or_of_very_unequal_ones_keeps_its_labels(sizes: tuple[int, ...]) -> None:
    target, labels = cells(sizes, PLATFORM)
    made = problem(target)
    assert (GenesVote().fit(made).predict(made.target).argmax(1) == labels).mean() > 0.95


def test_cells_of_a_known_study_move_nothing() -> None:
    new, _ = cells((40, 40, 40), PLATFORM)
    known, _ = cells((500, 0, 0), seed=9)
    alone, both = problem(new), problem(new)
    x = np.concatenate([new.toarray(), known.toarray()])
    names = np.repeat(["new", "old"], [new.shape[0], known.shape[0]])
    both = replace(both, target=type(both.target)(type(new)(x), np.full(len(x), "human"), names))
    means = [GenesVote().fit(one).classifier.members[2].head.means_CH for one in (alone, both)]
    np.testing.assert_allclose(*means, atol=1e-6)
