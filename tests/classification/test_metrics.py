"""Scores against hand-worked cases and scikit-learn; intervals against the law they sample."""

import numpy as np
import pytest
from sklearn import metrics
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from mixgf.classification.metrics import Comparison, class_scores, compare, confusion, mcnemar, rejection, score, totals
from mixgf.stats import intervals

TRUE = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
GUESS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 0, 2])
DONORS = np.array(list("aabbccddab"))


def random_case(seed: int, cells: int = 400, classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.choice(classes, cells, p=[0.6, 0.2, 0.1, 0.06, 0.04])
    predicted = np.where(rng.random(cells) < 0.7, true, rng.integers(0, classes, cells))
    return true, predicted, rng.uniform(1 / classes, 1, cells)


def value(
    name: str, true: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, classes: int
) -> intervals.Interval:
    found, _ = score(true, predicted, confidence, np.full(len(true), ""), classes, rng=np.random.default_rng(0))
    return found[name]


def test_hand_worked_ten_cells() -> None:
    # confusion: class 0: 3 right, 1 -> 1; class 1: 2 right, 1 -> 2; class 2: 2 right, 1 -> 0
    table = confusion(TRUE, GUESS, 3)
    assert table.tolist() == [[3, 1, 0], [0, 2, 1], [1, 0, 2]]
    found = class_scores(table)
    np.testing.assert_allclose(found["precision"], [3 / 4, 2 / 3, 2 / 3])
    np.testing.assert_allclose(found["recall"], [3 / 4, 2 / 3, 2 / 3])
    total = totals(table)
    assert total["accuracy"] == pytest.approx(0.7)
    assert total["macro_f1"] == pytest.approx((3 / 4 + 2 / 3 + 2 / 3) / 3)


def test_hand_worked_calibration_error() -> None:
    # two bins: four cells said 0.9 and three were right, two cells said 0.5 and none was: (4*|.75-.9| + 2*.5) / 6
    true, predicted = np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, dtype=np.int64)
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    assert value("ece", true, predicted, confidence, 2).value == pytest.approx((4 * 0.15 + 2 * 0.5) / 6)


@pytest.mark.parametrize("seed", range(3))
def test_totals_equal_scikit_learn(seed: int) -> None:
    true, predicted, _ = random_case(seed)
    found = totals(confusion(true, predicted, 5))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(true, predicted), abs=1e-12)
    per_class = metrics.precision_recall_fscore_support(true, predicted, labels=range(5))
    table = class_scores(confusion(true, predicted, 5))
    for ours, theirs in zip(("precision", "recall", "f1"), per_class, strict=False):
        np.testing.assert_allclose(table[ours], theirs, atol=1e-12)


def test_a_class_without_test_cells_does_not_count_as_a_zero() -> None:
    assert totals(confusion(np.array([0, 1]), np.array([0, 1]), 3))["macro_f1"] == 1.0


def test_the_interval_of_accuracy_is_the_binomial_one() -> None:
    true, predicted, confidence = random_case(1, cells=2000)
    found = value("accuracy", true, predicted, confidence, 5)
    half = 1.96 * np.sqrt(found.value * (1 - found.value) / 2000)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found.low < found.value < found.high


def test_donors_that_differ_widen_the_interval_and_are_named() -> None:
    true = np.zeros(300, dtype=np.int64)
    donors = np.repeat(np.array(["a", "b", "c"]), 100)
    predicted = np.where(donors == "a", 1, 0)  # one donor all wrong: 300 cells tell as much as three
    confidence = np.full(300, 0.5)
    clustered, by = score(true, predicted, confidence, donors, 2, rng=np.random.default_rng(0))
    assert by == "donor"
    assert (clustered["accuracy"].low, clustered["accuracy"].high) == (0.0, 1.0)
    two, by_two = score(
        true, predicted, confidence, np.where(donors == "c", "b", donors), 2, rng=np.random.default_rng(0)
    )
    assert by_two == "cell"
    assert two["accuracy"].high - two["accuracy"].low < 0.12


def test_a_resample_draws_as_many_clusters_as_there_are_each_whole() -> None:
    clusters = np.array([0, 0, 0, 1, 1, 2])
    entries = np.array([0, 0, 1, 2, 2, 3])
    drawn = intervals.bootstrap_counts(clusters, entries, 4, rng=np.random.default_rng(0), num_resamples=4000)
    times = np.stack([drawn[:, 1], drawn[:, 2] // 2, drawn[:, 3]])  # how often each cluster was drawn
    assert (times.sum(0) == 3).all()
    assert (drawn[:, 0] == 2 * drawn[:, 1]).all()
    np.testing.assert_allclose(times.mean(1), 1, atol=0.06)
    np.testing.assert_allclose(times.var(1), 3 * (1 / 3) * (2 / 3), atol=0.06)


def test_equal_clusters_are_drawn_with_the_same_law() -> None:
    drawn = intervals.bootstrap_counts(
        np.arange(40), np.repeat([0, 1], [30, 10]), 2, rng=np.random.default_rng(0), num_resamples=4000
    )
    assert (drawn.sum(1) == 40).all()
    assert drawn[:, 0].mean() == pytest.approx(30, abs=0.2)
    assert drawn[:, 0].var() == pytest.approx(40 * 0.75 * 0.25, rel=0.1)


@pytest.mark.parametrize(("first", "second"), [(7, 1), (3, 3), (0, 5), (12, 4)])
def test_mcnemar_equals_statsmodels(first: int, second: int) -> None:
    reference = reference_mcnemar([[10, first], [second, 4]], exact=True).pvalue
    assert mcnemar(first, second) == pytest.approx(reference)


def test_mcnemar_of_no_difference_is_one() -> None:
    assert mcnemar(0, 0) == 1.0


def paired(
    model: np.ndarray, baseline: np.ndarray, true: np.ndarray, seeds: np.ndarray, cells: np.ndarray
) -> Comparison:
    return compare(
        true_M=true, model_M=model, baseline_M=baseline, cells_M=cells, donors_M=np.full(len(true), ""), seeds_M=seeds,
        num_classes=5, rng=np.random.default_rng(0),
    )  # fmt: skip


def test_a_model_against_itself_ties_with_no_interval() -> None:
    true, predicted, _ = random_case(0)
    found = paired(predicted, predicted, true, np.zeros(400, dtype=np.int64), np.arange(400))
    assert (found.accuracy, found.outcome, found.p) == (intervals.Interval(0, 0, 0), "tie", 1.0)


def test_a_better_model_wins_a_worse_one_loses_by_the_same() -> None:
    true, predicted, _ = random_case(0)
    zeros = np.zeros(400, dtype=np.int64)
    better, worse = (paired(*pair, true, zeros, np.arange(400)) for pair in ((true, predicted), (predicted, true)))
    assert (better.outcome, worse.outcome) == ("win", "loss")
    assert better.accuracy.value == pytest.approx(1 - metrics.accuracy_score(true, predicted))
    assert better.accuracy.value == -worse.accuracy.value
    assert better.macro_f1.value == pytest.approx(1 - metrics.f1_score(true, predicted, average="macro"))


def test_a_cell_tested_in_several_seeds_counts_once() -> None:
    true, predicted, _ = random_case(0)
    one = paired(true, predicted, true, np.zeros(400, dtype=np.int64), np.arange(400))
    twice = paired(
        np.tile(true, 3), np.tile(predicted, 3), np.tile(true, 3), np.repeat([0, 1, 2], 400), np.tile(np.arange(400), 3)
    )
    assert twice.accuracy.value == pytest.approx(one.accuracy.value)
    width, width_twice = (c.accuracy.high - c.accuracy.low for c in (one, twice))
    assert width_twice == pytest.approx(width, rel=0.1)


def test_more_seeds_of_the_same_cells_are_no_more_evidence() -> None:
    true, model, baseline = np.zeros(20, int), np.zeros(20, int), np.repeat([0, 1], [12, 8])
    keywords = {"num_classes": 2, "rng": np.random.default_rng(0)}

    def p(times: int) -> float:
        rows = {name: np.tile(v, times) for name, v in (("true_M", true), ("model_M", model), ("baseline_M", baseline))}
        cells, seeds = np.tile(np.arange(20), times), np.repeat(np.arange(times), 20)
        return compare(**rows, cells_M=cells, seeds_M=seeds, donors_M=np.full(20 * times, ""), **keywords).p

    assert p(1) == pytest.approx(2 * 0.5**8)
    assert p(5) == p(1)


def test_rejection_by_hand_and_against_scikit_learn() -> None:
    # unseen .2 and .5; known .5 (a tie), .6 ... : of 2 x 4 pairs 7.5 are in order
    confidence, unseen = np.array([0.2, 0.5, 0.5, 0.6, 0.8, 0.9]), np.array([True, True, False, False, False, False])
    found, by = rejection(confidence, unseen, np.full(6, ""), rng=np.random.default_rng(0))
    assert found["auroc"].value == pytest.approx(7.5 / 8)
    assert found["rejected"].value == 0.5  # a limit that lets 95 % of four known cells pass lies at the lowest of them
    assert by == "cell"
    rng = np.random.default_rng(4)
    unseen = rng.random(500) < 0.2
    confidence = np.round(rng.normal(np.where(unseen, 0.6, 0.75), 0.1), 2)
    found, by = rejection(confidence, unseen, rng.choice(list("abcd"), 500), rng=rng)
    assert found["auroc"].value == pytest.approx(metrics.roc_auc_score(unseen, -confidence))
    limit = np.quantile(confidence[~unseen], 0.05, method="inverted_cdf")
    assert found["rejected"].value == pytest.approx((confidence[unseen] < limit).mean(), abs=0.05)
    assert found["auroc"].low < found["auroc"].value < found["auroc"].high
    assert by == "donor"
