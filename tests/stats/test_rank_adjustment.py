"""Laws of the adjustment for rank: against the definitions written out in plain loops."""

import math

import numpy as np
import pytest
import scipy.stats

from mixgf.stats import rank_adjustment
from mixgf.stats.donors import subtract_background

pytestmark = pytest.mark.filterwarnings("error")

NAN = math.nan


def weighted_line(x, y, weight):
    """Value at 0 of the weighted least-squares line, and the share of each y in it."""
    s0, s1, s2 = weight.sum(), (weight * x).sum(), (weight * x * x).sum()
    determinant = s0 * s2 - s1 * s1
    share = weight / s0 if determinant <= 1e-9 * s0 * s2 else weight * (s2 - s1 * x) / determinant
    return (share * y).sum(), share


def lowess(effect, rank, among, span):
    """`expected_by_rank` and its error, one gene at a time (Cleveland 1979)."""
    usable = np.isfinite(effect) & np.isfinite(rank)
    fitted = sorted(np.flatnonzero(usable & among).tolist(), key=lambda g: rank[g])
    num = len(fitted)
    width = min(num, 401, max(21, round(span * num)))
    robust, predicted, error = {}, np.full(len(effect), NAN), np.full(len(effect), NAN)
    for iteration in range(3):
        for gene in np.flatnonzero(usable).tolist():
            place = fitted.index(gene) if gene in fitted else sum(rank[g] < rank[gene] for g in fitted)
            left = min(max(place - width // 2, 0), num - width)
            window = fitted[left : left + width]
            x, y = rank[window] - rank[gene], effect[window]
            far = np.abs(x).max()
            weight = (1 - (np.abs(x) / (far * (1 + 1e-9) if far > 0 else 1.0)) ** 3) ** 3
            weight[[g == gene for g in window]] = 0
            if iteration:
                off = np.array([abs(robust[g]) for g in window])
                limit = 6 * np.median(off)
                weight *= (1 - np.minimum(off / limit, 1) ** 2) ** 2 if limit > 0 else 1.0
            predicted[gene], share = weighted_line(x, y, weight)
            if iteration == 2:
                error[gene] = math.sqrt(((share * np.array([robust[g] for g in window])) ** 2).sum())
        robust = {g: effect[g] - predicted[g] for g in fitted}
    return predicted, error


def genes(num, seed):
    """Effects that fall with rank, some of them strong; a few ranks alike; two genes without a rank or an effect."""
    rng = np.random.default_rng(seed)
    rank = np.sort(np.exp(rng.normal(4, 1, num)))
    rank[num // 2 : num // 2 + 4] = rank[num // 2]
    rank = np.log(rng.permutation(rank))
    effect = 2 - 0.3 * rank + 0.1 * rng.normal(size=num) + (rng.random(num) < 0.05)
    effect[3], rank[5] = NAN, NAN
    among = rng.random(num) < 0.8
    return effect, rank, among


@pytest.mark.parametrize(("num", "span"), [(20, 0.15), (90, 0.15), (90, 0.5), (520, 0.9)])
def test_the_expectation_by_rank_is_the_robust_local_line_written_out(num, span):
    effect, rank, among = genes(num, 1)
    expected, _ = lowess(effect, rank, among, span)
    found = rank_adjustment.expected_by_rank(effect, rank, among, span=span)
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert np.isnan(found).sum() == 2


def test_the_error_of_the_expectation_is_the_sandwich_of_the_line_written_out():
    effect, rank, among = genes(150, 2)
    _, expected = lowess(effect, rank, among, 0.15)
    found = rank_adjustment.expectation_error(effect, rank, among)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)
    assert np.nanmin(found) > 0


def test_the_unit_of_effects_makes_no_difference_to_the_fit():
    effect, rank, among = genes(90, 3)
    for unit in (1e-6, 1e6):  # residuals far below and above 1
        found = rank_adjustment.expected_by_rank(effect * unit, rank, among)
        assert found / unit == pytest.approx(
            rank_adjustment.expected_by_rank(effect, rank, among), abs=1e-9, nan_ok=True
        )


def test_eleven_genes_are_enough_for_a_fit_and_ten_are_not():
    rank = np.arange(11.0)
    assert np.isfinite(rank_adjustment.expected_by_rank(rank, rank)).all()
    assert np.isnan(rank_adjustment.expected_by_rank(rank, np.where(rank == 4, NAN, rank))).all()


def test_a_residual_is_in_units_of_the_spread_at_its_rank_and_of_the_error_of_the_expectation():
    effect, rank, among = genes(150, 4)
    expected, error = lowess(effect, rank, among, 0.15)
    residual = effect - expected
    own = np.isfinite(effect) & np.isfinite(rank) & among
    spread = lowess(np.abs(residual), rank, among, 0.5)[0] * math.sqrt(math.pi / 2)
    spread = np.maximum(spread, 0.1 * np.median(np.abs(residual[own])))
    scaled = residual / np.hypot(spread, error)
    for g in range(150):  # what is like it: within a factor of 3; no later: five of them
        others = [rank[k] - rank[g] for k in np.flatnonzero(own) if k != g]
        like = sum(-math.log(3) <= d <= math.log(3) for d in others)
        earlier = sum(-math.log(3) <= d <= 0 for d in others)
        if like < 10 or earlier < 5:
            scaled[g] = NAN
    found = rank_adjustment.scaled_residual(effect, rank, among)
    assert found == pytest.approx(scaled, rel=1e-6, abs=1e-9, nan_ok=True)
    assert 5 < np.isnan(found).sum() < 100


def test_a_spread_of_almost_nothing_is_at_least_a_tenth_of_the_median():
    rng = np.random.default_rng(5)
    rank = np.log(np.linspace(10, 29, 120))
    effect = rng.normal(size=120)
    effect[50:90] *= 1e-3  # quiet ranks
    found = rank_adjustment.scaled_residual(effect, rank)
    residual = effect - rank_adjustment.expected_by_rank(effect, rank)
    floor = 0.1 * np.nanmedian(np.abs(residual))
    finite = np.isfinite(found)
    assert finite.sum() > 60
    assert (np.abs(found[finite]) <= np.abs(residual[finite]) / floor + 1e-12).all()
    assert np.isnan(rank_adjustment.scaled_residual(effect[:9], rank[:9])).all()


def nearest_percentile(effect, features, among, num):
    """`matched_percentile` by sorting all distances."""
    usable = np.flatnonzero(np.isfinite(effect) & np.isfinite(features).all(axis=1))
    places = np.stack([scipy.stats.rankdata(features[usable, f]) for f in range(features.shape[1])], axis=1) / len(
        usable
    )
    out = np.full(len(effect), NAN)
    for i, gene in enumerate(usable):
        others = [k for k in range(len(usable)) if k != i and among[usable[k]]]
        others = sorted(others, key=lambda k: ((places[k] - places[i]) ** 2).sum())[:num]
        null = effect[usable[others]]
        out[gene] = 100 * np.mean(np.where(null < effect[gene], 1.0, np.where(null == effect[gene], 0.5, 0.0)))
    return out


def test_a_percentile_is_among_the_nearest_other_genes_in_the_ranks_of_both_features():
    rng = np.random.default_rng(6)
    features, effect, among = rng.normal(size=(80, 2)), np.round(rng.normal(size=80), 1), rng.random(80) < 0.6
    effect[4], features[7, 1] = NAN, NAN
    for num in (7, 100):
        found = rank_adjustment.matched_percentile(effect, features, among, num_matched=num)
        few = among & np.isfinite(effect) & np.isfinite(features).all(axis=1)
        some = min(num, int(few.sum()) - 1)
        expected = nearest_percentile(effect, features, among, some)
        assert found == pytest.approx(expected, nan_ok=True)
    whole = rank_adjustment.matched_percentile(effect, features, num_matched=7)
    assert whole == pytest.approx(nearest_percentile(effect, features, np.ones(80, bool), 7), nan_ok=True)


def test_genes_are_matched_only_where_there_are_five_times_as_many():
    rng = np.random.default_rng(7)
    rank, coverage, scaled = rng.permutation(np.arange(100.0)), rng.random(100), rng.normal(size=100)
    features = np.stack([rank, coverage], axis=1)
    every = nearest_percentile(scaled, features, np.ones(100, bool), 99)
    few = nearest_percentile(scaled, features, np.ones(100, bool), 20)
    for num, expected in ((21, every), (20, few)):
        found = rank_adjustment.residual_percentile(scaled, scaled, rank, coverage, num_matched=num)
        assert found == pytest.approx(expected)
    among = np.arange(100) < 99  # 99 of them: fewer than five times 20
    found = rank_adjustment.residual_percentile(scaled, scaled, rank, coverage, among, num_matched=20)
    assert found == pytest.approx(nearest_percentile(scaled, features, among, 98))
    holed = np.where(np.arange(100) == 0, NAN, scaled)  # a gene without an effect is none of them
    found = rank_adjustment.residual_percentile(holed, holed, rank, coverage, num_matched=20)
    assert found == pytest.approx(nearest_percentile(holed, features, np.ones(100, bool), 98), nan_ok=True)


def test_p_among_residuals_that_mean_nothing_is_counted_without_the_gene_s_own():
    rng = np.random.default_rng(8)
    null = np.round(rng.normal(size=(12, 3)), 1)
    null[2, 1], null[5] = NAN, NAN
    scaled = np.round(rng.normal(0, 1.5, 12), 1)
    scaled[7] = NAN
    found = rank_adjustment.null_p_values(scaled, null)
    for g in range(12):
        pool = [v for k in range(12) if k != g for v in null[k].tolist() if not math.isnan(v)]
        above, below = sum(v >= scaled[g] for v in pool), sum(v <= scaled[g] for v in pool)
        expected = min(1.0, 2 * (1 + min(above, below)) / (1 + len(pool)))
        assert found[g] == (pytest.approx(expected) if g != 7 else pytest.approx(NAN, nan_ok=True))


def test_ten_values_of_other_genes_are_enough_for_a_p_and_nine_are_not():
    null = np.array([[1.0] * 5, [2.0] * 5, [3.0] * 5])
    assert rank_adjustment.null_p_values(np.array([9.0, 9, 9]), null) == pytest.approx([2 / 11] * 3)
    null[2, 0] = NAN
    assert rank_adjustment.null_p_values(np.array([9.0, 9, 9]), null) == pytest.approx([NAN, NAN, 2 / 11], nan_ok=True)


def test_residuals_of_the_gene_that_equal_its_effect_do_not_count():
    null = np.array([[-9.0] * 5, [1.0] * 5, [9.0] * 5])
    found = rank_adjustment.null_p_values(np.array([-9.0, 1, 9]), null)
    assert found == pytest.approx([2 / 11, 1, 2 / 11])


def test_a_gene_whose_rank_few_earlier_ones_have_has_no_residual():
    rng = np.random.default_rng(9)
    rank = np.log(np.concatenate([np.linspace(10, 12, 60), np.linspace(1_000, 1_200, 60)]))  # two groups, far apart
    found = rank_adjustment.scaled_residual(rng.normal(size=120), rank)
    assert np.isnan(found).nonzero()[0].tolist() == [0, 1, 2, 3, 4, 60, 61, 62, 63, 64]


def test_genes_exchange_in_blocks_of_about_the_window():
    rank, known = np.arange(100.0), np.ones((100, 1), dtype=bool)
    for window, blocks in ((10, 10), (33, 3), (101, 1), (60, 1)):
        edges = np.concatenate([np.full(len(b), i) for i, b in enumerate(np.array_split(np.arange(100), blocks))])
        moved = np.zeros(100, dtype=bool)
        for seed in range(6):
            (to,) = rank_adjustment.permute_within_rank(rank, known, np.random.default_rng(seed), window=window)
            assert (edges[to] == edges).all()
            moved |= to != np.arange(100)
        assert moved.mean() > 0.9
        assert np.abs(to - np.arange(100)).max() > 0.5 * 100 / blocks
    default = rank_adjustment.permute_within_rank(rank, known, np.random.default_rng(0))
    assert (default == rank_adjustment.permute_within_rank(rank, known, np.random.default_rng(0), window=25)).all()


def test_where_ranks_are_too_few_for_a_fit_the_mean_of_the_others_is_subtracted():
    rng = np.random.default_rng(9)
    means, rank = rng.normal(size=(40, 2)), np.where(np.arange(40) < 10, np.arange(40.0), NAN)
    found = rank_adjustment.residual_after_rank(means, rank)
    assert found == pytest.approx(subtract_background(means))
    rank[10] = 10.0
    among = np.arange(40) != 20
    found = rank_adjustment.residual_after_rank(means, rank, among)
    assert found[11:] == pytest.approx(subtract_background(means, among)[11:])
    fit = np.stack([rank_adjustment.expected_by_rank(column, rank, among) for column in means.T], axis=1)
    assert found[:11] == pytest.approx((means - fit)[:11])


def test_normal_scores_are_of_the_share_of_values_below_with_half_a_place_of_room():
    rng = np.random.default_rng(10)
    values, rank, among = rng.normal(size=(70, 2)), rng.permutation(np.arange(70.0)), rng.random(70) < 0.8
    values[3, 0] = NAN
    found = rank_adjustment.normal_scores(values, rank, among, num_matched=200)  # more than there are: all of them
    for c in range(2):
        num = int((among & np.isfinite(values[:, c])).sum()) - 1
        below = nearest_percentile(values[:, c], rank[:, None], among, num) / 100 * num
        assert found[among, c] == pytest.approx(scipy.stats.norm.ppf((below + 0.5) / (num + 1))[among], nan_ok=True)
    usual = rank_adjustment.normal_scores(values, rank, among)
    assert usual == pytest.approx(rank_adjustment.normal_scores(values, rank, among, num_matched=50), nan_ok=True)


def test_more_genes_than_are_fitted_at_a_time_are_all_fitted():
    rank = np.linspace(0, 8, 4200)
    assert rank_adjustment.expected_by_rank(3 - rank, rank) == pytest.approx(3 - rank, abs=1e-9)
