"""Scores against hand-worked cases and scikit-learn; intervals against the law they sample."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests

from mixgf.classification.metrics import (
    Comparison,
    Difference,
    _normal_p,
    class_scores,
    compare,
    confusion,
    mcnemar,
    outcomes,
    rejection,
    score,
    totals,
)
from mixgf.classification.tables import with_outcomes
from mixgf.stats import donors, intervals

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


def donors_of(numbers: list[int]) -> np.ndarray:
    return np.repeat([f"donor {k}" for k in range(len(numbers))], numbers)


def test_the_interval_over_donors_is_students_t_on_the_jackknife() -> None:
    # 4 donors of 100 cells, 90, 80, 70 and 60 right. Accuracy is linear, so the jackknife error is that of the 4 shares.
    true = np.zeros(400, dtype=np.int64)
    predicted = np.concatenate([np.repeat([0, 1], [n, 100 - n]) for n in (90, 80, 70, 60)])
    other = np.concatenate([np.repeat([0, 1], [n, 100 - n]) for n in (80, 75, 70, 65)])
    found = compare(
        true_M=true, model_M=predicted, baseline_M=other, cells_M=np.arange(400), donors_M=donors_of([100] * 4),
        seeds_M=np.zeros(400, dtype=np.int64), num_classes=2, rng=np.random.default_rng(0),
    )  # fmt: skip
    reference = stats.ttest_1samp([0.1, 0.05, 0.0, -0.05], 0)
    low, high = reference.confidence_interval(0.95)
    assert found.by == "donor"
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((low, high))
    assert found.accuracy.p == pytest.approx(reference.pvalue)


def test_two_or_three_donors_are_too_few_and_so_is_one_that_is_held_out() -> None:
    true, predicted, confidence = random_case(1, cells=300)
    for numbers, held_out, by in (([300], False, "cell"), ([300], True, "none"), ([100, 200], False, "none"),
                                  ([100] * 3, False, "none"), ([75] * 4, True, "donor")):  # fmt: skip
        found, over = score(
            true, predicted, confidence, donors_of(numbers), 5, rng=np.random.default_rng(0), held_out=held_out
        )
        assert over == by
        assert np.isnan(found["accuracy"].low) == (by == "none")
        paired_ = compare(
            true_M=true, model_M=true, baseline_M=predicted, cells_M=np.arange(300), donors_M=donors_of(numbers),
            seeds_M=np.zeros(300, dtype=np.int64), num_classes=5, rng=np.random.default_rng(0), held_out=held_out,
        )  # fmt: skip
        assert (paired_.by, np.isnan(paired_.macro_f1.p)) == (by, by == "none")


def study(rng: np.random.Generator, num_donors: int) -> tuple[np.ndarray, ...]:
    """Cells of donors who differ in size, composition and in how well two equal models do on them."""
    sizes = np.clip(np.exp(rng.normal(np.log(150), 0.6, num_donors)), 20, 2000).astype(int)
    donor = np.repeat(np.arange(num_donors), sizes)
    true = np.concatenate([rng.choice(3, n, p=rng.dirichlet([6, 3, 2])) for n in sizes])
    quality = rng.normal(1.2, 0.8, num_donors)[donor]
    both = []
    for _ in range(2):
        right = rng.random(len(true)) < 1 / (1 + np.exp(-quality - rng.normal(0, 0.4, num_donors)[donor]))
        both.append(np.where(right, true, (true + rng.integers(1, 3, len(true))) % 3))
    return true, *both, donor


@pytest.mark.parametrize("num_donors", [4, 6, 9, 15])
def test_intervals_over_donors_cover(num_donors: int) -> None:
    # a percentile bootstrap of the same donors covers .79, .83, .88 and .89 of the differences
    rng = np.random.default_rng(num_donors)
    true, model, _, _ = study(rng, 20_000)
    truth = totals(confusion(true, model, 3))
    covered, wins, runs = {"score": 0, "difference": 0}, 0, 400
    for _ in range(runs):
        true, model, other, donor = study(rng, num_donors)
        names = donor.astype(np.str_)
        found, by = score(true, model, np.ones(len(true)), names, 3, rng=rng)
        difference = compare(
            true_M=true, model_M=model, baseline_M=other, cells_M=np.arange(len(true)), donors_M=names,
            seeds_M=np.zeros(len(true), dtype=np.int64), num_classes=3, rng=rng,
        ).macro_f1  # fmt: skip
        assert by == "donor"
        covered["score"] += found["macro_f1"].low <= truth["macro_f1"] <= found["macro_f1"].high
        covered["difference"] += difference.low <= 0 <= difference.high
        wins += difference.p <= 0.05
    allowed = 2.5 * np.sqrt(0.93 * 0.07 / runs)  # of the simulation
    assert min(covered.values()) / runs >= 0.93 - allowed, covered
    assert wins == runs - covered["difference"]


def test_outcomes_are_by_the_corrected_p() -> None:
    p = np.array([0.01, 0.02, 0.04, np.nan])
    assert donors.holm(p)[:3].tolist() == pytest.approx(multipletests(p[:3], method="holm")[1].tolist())
    assert outcomes(np.array([0.1, -0.1, 0.1, 0.1]), np.array([0.03, 0.04, 0.06, np.nan])) == [
        "win",
        "loss",
        "tie",
        "unknown",
    ]
    frame = pd.DataFrame({
        "model": ["a"] * 4 + ["b"], "metric": "macro_f1", "difference": [0.1, -0.1, 0.1, 0.1, 0.1], "p": [*p, 0.04],
    })  # fmt: skip
    found = with_outcomes(frame)
    assert found["p_holm"][:3].tolist() == pytest.approx([0.03, 0.04, 0.04])
    assert found["outcome"].tolist() == ["win", "loss", "win", "unknown", "win"]  # the tasks of model b count apart


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
    assert (found.accuracy, found.p_mcnemar) == (Difference(0, 0, 0, 1.0), 1.0)


def test_a_better_model_wins_a_worse_one_loses_by_the_same() -> None:
    true, predicted, _ = random_case(0)
    zeros = np.zeros(400, dtype=np.int64)
    better, worse = (paired(*pair, true, zeros, np.arange(400)) for pair in ((true, predicted), (predicted, true)))
    assert (better.macro_f1.low > 0, worse.macro_f1.high < 0) == (True, True)
    assert (better.macro_f1.p, worse.macro_f1.p) == pytest.approx((0, 0), abs=1e-6)
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
        return compare(**rows, cells_M=cells, seeds_M=seeds, donors_M=np.full(20 * times, ""), **keywords).p_mcnemar

    assert p(1) == pytest.approx(2 * 0.5**8)
    assert p(5) == p(1)


def test_rejection_of_cells_of_one_held_out_donor_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    confidence, unseen = rng.random(40), np.arange(40) < 20
    for held_out, by in ((False, "cell"), (True, "none")):
        found, over = rejection(confidence, unseen, np.full(40, "d"), rng=np.random.default_rng(0), held_out=held_out)
        assert over == by
        assert np.isnan(found["auroc"].low) == held_out


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


def test_the_calibration_error_is_over_fifteen_bins_that_hold_their_upper_edge() -> None:
    rng = np.random.default_rng(3)
    true, predicted = rng.integers(0, 3, 300), rng.integers(0, 3, 300)
    confidence = np.concatenate([np.arange(1, 16) / 15, [1e-9, 1.0], rng.uniform(0, 1, 283)])
    right = (true == predicted).astype(float)
    gap = 0.0
    for k in range(15):
        mine = (confidence > k / 15 + 1e-12) & (confidence <= (k + 1) / 15 + 1e-12)
        gap += abs((right - confidence)[mine].sum())
    assert value("ece", true, predicted, confidence, 3).value == pytest.approx(gap / 300)


def test_the_two_highest_bins_of_the_calibration_error_are_two() -> None:
    # .95 and all wrong; .9 and all right: gaps of .95 and .1 of half of the cells each, which do not cancel
    true, predicted = np.array([0, 0, 1, 1]), np.ones(4, dtype=np.int64)
    confidence = np.array([0.95, 0.95, 0.9, 0.9])
    assert value("ece", true, predicted, confidence, 2).value == pytest.approx((0.95 + 0.1) / 2)
    low = np.array([0.05, 0.05, 0.1, 0.1])  # in the two lowest bins: gaps of .05 and .9
    assert value("ece", true, predicted, low, 2).value == pytest.approx((0.05 + 0.9) / 2)


def test_the_p_of_a_difference_over_cells_is_normal_with_the_spread_of_the_bootstrap() -> None:
    # 30 of 100 cells are right only in the model, 10 only in the baseline: accuracy + .2, standard error sqrt(.4 - .04) / 10
    true = np.zeros(100, int)
    model, baseline = np.repeat([0, 1, 0], [30, 10, 60]), np.repeat([1, 0, 0], [30, 10, 60])
    found = compare(
        true_M=true, model_M=model, baseline_M=baseline, cells_M=np.arange(100), donors_M=np.full(100, "d"), seeds_M=true,
        num_classes=2, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert found.by == "cell"
    assert found.accuracy.value == pytest.approx(0.2)
    assert found.accuracy.high - found.accuracy.low == pytest.approx(2 * 1.96 * 0.06, rel=0.1)
    assert np.log(found.accuracy.p) == pytest.approx(np.log(2 * stats.norm.sf(0.2 / 0.06)), rel=0.15)
    assert found.p_mcnemar == pytest.approx(stats.binomtest(30, 40).pvalue)


def test_a_p_of_exactly_the_level_is_a_win() -> None:
    assert outcomes(np.array([0.1, -0.1, 0.0]), np.array([0.05, 0.05, 0.0501])) == ["win", "loss", "tie"]


def test_differences_are_means_over_seeds_of_differences_within_a_seed() -> None:
    # seed 0 tests 2 cells, seed 1 tests 8: macro F1 is 1 and 0 in seed 0, equal in seed 1
    true = np.array([0, 1, *[0, 1] * 4])
    model, baseline = true.copy(), np.array([1, 0, *[0, 1] * 4])
    seeds = np.array([7, 7, *[9] * 8])
    found = compare(
        true_M=true, model_M=model, baseline_M=baseline, cells_M=np.arange(10), donors_M=np.full(10, "d"), seeds_M=seeds,
        num_classes=2, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert (found.accuracy.value, found.macro_f1.value) == pytest.approx((0.5, 0.5))


def test_the_limit_of_rejection_lets_95_percent_of_the_known_cells_pass() -> None:
    # 20 known cells: one may be refused, the lowest; unseen cells at its probability are refused, those above are not
    confidence = np.concatenate([np.linspace(0.3, 0.9, 20), [0.2, 0.3, 0.34, 0.8]])
    unseen = np.arange(24) >= 20
    found, _ = rejection(confidence, unseen, np.full(24, "d"), rng=np.random.default_rng(0))
    assert found["rejected"].value == 0.5
    assert found["auroc"].value == pytest.approx(metrics.roc_auc_score(unseen, -confidence))
    few, _ = rejection(confidence[1:], unseen[1:], np.full(23, "d"), rng=np.random.default_rng(0))
    assert few["rejected"].value == 0.5  # of 19 known cells none may be refused: below the lowest, .33


def test_a_resample_without_unseen_cells_says_nothing_for_or_against() -> None:
    confidence, unseen = np.array([0.1, *np.linspace(0.5, 0.9, 30)]), np.arange(31) < 1
    found, _ = rejection(confidence, unseen, np.full(31, "d"), rng=np.random.default_rng(0))
    assert found["auroc"].value == 1.0
    assert found["auroc"].low == 0.5  # a third of the resamples lack the only unseen cell
    one_known, _ = rejection(1 - confidence, ~unseen, np.full(31, "d"), rng=np.random.default_rng(0))
    assert (one_known["auroc"].value, one_known["auroc"].low) == (1.0, 0.5)


def test_scores_of_donors_are_bounded_and_their_differences_are_not() -> None:
    true = np.zeros(400, dtype=np.int64)
    predicted = np.concatenate([np.repeat([0, 1], [n, 100 - n]) for n in (100, 99, 100, 60)])
    found, by = score(true, predicted, np.ones(400), donors_of([100] * 4), 2, rng=np.random.default_rng(0))
    assert by == "donor"
    assert 0 < found["accuracy"].low < found["accuracy"].value < found["accuracy"].high < 1
    difference = compare(
        true_M=true, model_M=true, baseline_M=predicted, cells_M=np.arange(400), donors_M=donors_of([100] * 4),
        seeds_M=true, num_classes=2, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert difference.accuracy.low < 0 < difference.accuracy.p < 1


def test_the_normal_p_of_a_bootstrap_by_hand() -> None:
    drawn = np.array([0.1, 0.2, 0.3, 0.4])
    assert _normal_p(-0.25, drawn) == pytest.approx(2 * stats.norm.sf(0.25 / drawn.std(ddof=1)))
    assert (_normal_p(0.0, np.zeros(3)), _normal_p(0.1, np.zeros(3))) == (1.0, 0.0)
