"""Laws of intervals: by hand, by the published formulas written out in loops, and against statsmodels."""

import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.proportion import proportion_confint

from mixgf.stats import intervals
from mixgf.stats.intervals import Interval

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (3, 7), (1, 1), (40, 1000)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_wilson_equals_statsmodels(successes, trials, confidence):
    found = intervals.wilson(successes, trials, confidence=confidence)
    low, high = proportion_confint(successes, trials, alpha=1 - confidence, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((successes / trials, low, high), abs=1e-12)


def test_no_trials_have_no_proportion():
    found = intervals.wilson(0, 0)
    assert np.isnan([found.value, found.low, found.high]).all()


def delong(score, positive):
    """Area, and placements of every positive and every negative, by the pairs."""
    pairs = [
        [1.0 if a > b else 0.5 if a == b else 0.0 for b in score[~positive].tolist()]
        for a in score[positive].tolist()
    ]  # fmt: skip
    table = np.array(pairs)
    return table.mean(), table.mean(axis=1), table.mean(axis=0)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_of_an_auroc_is_delong_s(confidence):
    rng = np.random.default_rng(0)
    positive = np.arange(30) % 4 == 0
    one, other = (np.round(rng.normal(0.7 * positive, 1), 1) for _ in range(2))  # with ties
    z = scipy.stats.norm.ppf((1 + confidence) / 2)
    sides = []
    for score in (one, other):
        area, above, below = delong(score, positive)
        half = z * math.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))
        found = intervals.auroc(score, positive, confidence=confidence)
        assert (found.value, found.low, found.high) == pytest.approx((area, area - half, area + half), rel=1e-12)
        sides.append((area, above, below))
    (a, a_above, a_below), (b, b_above, b_below) = sides
    above, below = a_above - b_above, a_below - b_below
    half = z * math.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))
    found = intervals.auroc_difference(one, other, positive, confidence=confidence)
    assert (found.value, found.low, found.high) == pytest.approx((a - b, a - b - half, a - b + half), rel=1e-9)


def test_an_interval_of_an_auroc_ends_at_0_and_1_and_needs_two_of_each_kind():
    positive = np.array([True, True, True, False, False, False])
    found = intervals.auroc(np.array([9.0, 8, 4, 5, 3, 1]), positive)
    assert found.value == pytest.approx(8 / 9)
    assert found.high == 1.0
    assert intervals.auroc(-np.array([9.0, 8, 4, 5, 3, 1]), positive).low == 0.0
    two = intervals.auroc(np.array([1.0, 3, 2, 4]), np.array([True, True, False, False]))
    assert (two.value, two.low, two.high) == (0.25, 0.0, pytest.approx(0.25 + 1.959964 * math.sqrt(0.125), abs=1e-5))
    for few in ([True, False, False, False], [True, True, True, False]):
        found = intervals.auroc(np.array([1.0, 3, 2, 4]), np.array(few))
        assert found.value == 0.0
        assert np.isnan([found.low, found.high]).all()
    for none in (np.ones(4, bool), np.zeros(4, bool)):
        assert np.isnan(intervals.auroc(np.arange(4.0), none).value)


def test_units_of_an_interval_by_hand():
    for names, held_out, expected in (
        (["a", "a"], False, ([0, 1], "cell")),
        (["a", "a"], True, ([0, 0], "none")),
        (["b", "a", "b"], False, ([1, 0, 1], "none")),
        (["c", "a", "b"], True, ([2, 0, 1], "none")),
        (["d", "a", "c", "b", "a"], False, ([3, 0, 2, 1, 0], "donor")),
        (["d", "a", "c", "b", "a"], True, ([3, 0, 2, 1, 0], "donor")),
    ):
        units, by = intervals.interval_units(np.array(names), held_out=held_out)
        assert (units.tolist(), by) == expected


def test_counts_without_each_donor_by_hand():
    counts, sizes = intervals.leave_one_out_counts(np.array([0, 2, 1, 0, 2]), np.array([1, 0, 0, 1, 3]), 4)
    assert counts.tolist() == [[2, 0, 0, 1], [1, 2, 0, 1], [1, 2, 0, 0]]
    assert sizes.tolist() == [2, 1, 2]


def test_the_jackknife_by_hand():
    # donors of 10, 20, 30 and 40 cells: 100^2 / 3,000 - 1 = 7 / 3 degrees of freedom
    left_out, sizes = np.array([0.3, 0.1, 0.2, 0.5]), np.array([10, 20, 30, 40])
    error = math.sqrt(3 / 4 * (0.1**2 + 0.1**2 + 0.0 + 0.3**2))
    found, p = intervals.jackknife_interval(0.2, left_out, sizes)
    half = scipy.stats.t.ppf(0.975, 7 / 3) * error
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-12)
    assert p == pytest.approx(2 * scipy.stats.t.sf(0.2 / error, 7 / 3), rel=1e-12)
    assert intervals.jackknife_interval(-0.2, -left_out, sizes)[1] == pytest.approx(p, rel=1e-12)


def test_one_large_donor_leaves_one_degree_of_freedom():
    left_out, sizes = np.array([0.3, 0.1, 0.2, 0.2]), np.array([5000, 1, 1, 1])
    found, _ = intervals.jackknife_interval(0.2, left_out, sizes)
    assert found.high - 0.2 == pytest.approx(scipy.stats.t.ppf(0.975, 1) * math.sqrt(3 / 4 * 0.02), rel=1e-12)


def test_the_jackknife_of_a_share_is_on_the_logit_scale_by_hand():
    def logit(x):
        return math.log(x / (1 - x))

    left_out, sizes = np.array([0.9, 0.8, 0.7, 0.9]), np.array([25] * 4)
    error = math.sqrt(3 / 4 * sum((logit(x) - logit(0.8)) ** 2 for x in left_out.tolist()))
    half = scipy.stats.t.ppf(0.975, 3) * error
    found, p = intervals.jackknife_interval(0.8, left_out, sizes, bounded=True)
    assert found.low == pytest.approx(1 / (1 + math.exp(-(logit(0.8) - half))), rel=1e-12)
    assert found.high == pytest.approx(1 / (1 + math.exp(-(logit(0.8) + half))), rel=1e-12)
    assert math.isnan(p)
    # a score of 1 is read as half a cell less than all of one more: 0.5 / 101 below it
    edge = 0.5 / 101
    error = math.sqrt(3 / 4 * (logit(1 - edge) - logit(0.9)) ** 2)
    found, _ = intervals.jackknife_interval(1.0, np.array([1.0, 1.0, 1.0, 0.9]), sizes, bounded=True)
    low = 1 / (1 + math.exp(-(logit(1 - edge) - scipy.stats.t.ppf(0.975, 3) * error)))
    assert (found.value, found.low, found.high) == (1.0, pytest.approx(low, rel=1e-12), 1.0)
    found, _ = intervals.jackknife_interval(0.0, np.array([0.0, 0.0, 0.0, 0.1]), sizes, bounded=True)
    assert (found.low, found.high) == (0.0, pytest.approx(1 - low, rel=1e-12))


def test_a_share_that_no_donor_changes_has_wilson_s_interval():
    found, p = intervals.jackknife_interval(0.75, np.full(4, 0.75), np.array([25] * 4), bounded=True)
    wilson = intervals.wilson(75, 100)
    assert (found.value, found.low, found.high) == (0.75, wilson.low, wilson.high)
    assert math.isnan(p)
    rounded, _ = intervals.jackknife_interval(0.999, np.full(4, 0.999), np.array([1] * 4), bounded=True)
    assert rounded.low <= rounded.value <= rounded.high  # 0.999 of 4 cells is 4 cells, whose interval ends at 1


def test_a_difference_that_no_donor_changes_is_certain():
    sizes = np.array([25] * 4)
    assert intervals.jackknife_interval(0.5, np.full(4, 0.5), sizes) == (Interval(0.5, 0.5, 0.5), 0.0)
    assert intervals.jackknife_interval(0.0, np.zeros(4), sizes) == (Interval(0.0, 0.0, 0.0), 1.0)


def test_the_percentile_interval_has_the_middle_95_percent():
    drawn = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert intervals.percentile_interval(7.0, drawn) == Interval(7.0, pytest.approx(25), pytest.approx(975))


def test_a_bootstrap_draws_clusters_of_any_pattern_as_often_as_others():
    """Clusters 1 and 2 have the same entries in another order: one pattern that is drawn twice as often."""
    clusters, entries = np.array([0, 1, 1, 2, 2]), np.array([0, 1, 2, 2, 1])
    drawn = intervals.bootstrap_counts(clusters, entries, 3, rng=np.random.default_rng(0))
    assert drawn.shape == (intervals.NUM_RESAMPLES, 3)
    assert (drawn[:, 1] == drawn[:, 2]).all()
    assert (drawn[:, 0] + drawn[:, 1] == 3).all()
    assert drawn[:, 0].mean() == pytest.approx(1, abs=4 * math.sqrt(2 / 3 / 1000))
