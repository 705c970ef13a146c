"""Laws of the statistics: equal to scipy and statsmodels, calibrated at donor level, powered where effects are planted."""

import warnings

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from mixgf.stats import rank_adjustment
from mixgf.stats.donors import (
    attainable_level,
    benjamini_hochberg,
    cluster_means,
    fewest_discoveries,
    group_means,
    holm,
    means_by_group,
    rank_sums,
    sign_flip,
    sign_flip_power,
    smallest_detectable_effect,
    smallest_p,
    spearman,
    subtract_background,
    welch,
)

pytestmark = pytest.mark.filterwarnings("error")


def _flat(groups):
    values = np.concatenate(groups)
    return values, np.repeat(np.arange(len(groups)), [len(g) for g in groups])


@pytest.fixture(params=[False, True], ids=["no ties", "many ties"])
def groups(request):
    rng = np.random.default_rng([1, int(request.param)])
    sizes = [1, 2, 7, 30, 5]
    draws = [rng.normal(i / 4, 1, n) for i, n in enumerate(sizes)]
    return [np.round(g) for g in draws] if request.param else draws


def test_rank_sums_against_the_others_equals_scipy(groups):
    values, group = _flat(groups)
    z, p = rank_sums(values, group, len(groups))
    z_plain, p_plain = rank_sums(values, group, len(groups), correct_ties=False)
    for g, own in enumerate(groups):
        others = values[group != g]
        expected = scipy.stats.mannwhitneyu(own, others, method="asymptotic", use_continuity=False)
        assert p[g] == pytest.approx(expected.pvalue, rel=1e-10)
        plain = scipy.stats.ranksums(own, others)
        assert (z_plain[g], p_plain[g]) == pytest.approx((plain.statistic, plain.pvalue), rel=1e-10)
        assert np.sign(z[g]) == np.sign(plain.statistic)


def test_rank_sums_with_self_in_the_pool_equals_scipy(groups):
    values, group = _flat(groups)
    z, p = rank_sums(values, group, len(groups), include_self=True)
    for g, own in enumerate(groups):
        expected = scipy.stats.ranksums(own, values)
        assert (z[g], p[g]) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-10)


def test_rank_sums_of_an_empty_group_or_without_others_is_nan():
    values, group = np.array([1.0, 2.0]), np.array([1, 1])
    assert np.isnan(rank_sums(values, group, 3)[1]).all()
    assert rank_sums(np.zeros(4), np.array([0, 0, 1, 1]), 2)[1].tolist() == [1.0, 1.0]  # all equal: no evidence


def test_benjamini_hochberg_equals_statsmodels_and_passes_nan_by():
    p = np.random.default_rng(2).uniform(size=50) ** 3
    p[7] = p[8]
    assert benjamini_hochberg(p) == pytest.approx(multipletests(p, method="fdr_bh")[1], rel=1e-12)
    with_nan = np.insert(p, 10, np.nan)
    fdr = benjamini_hochberg(with_nan)
    assert np.isnan(fdr[10])
    assert np.delete(fdr, 10) == pytest.approx(benjamini_hochberg(p), rel=1e-12)
    # by hand: 0.01*3/1, 0.02*3/2, 0.5*3/3, made monotone
    assert benjamini_hochberg(np.array([0.5, 0.01, 0.02])).tolist() == pytest.approx([0.5, 0.03, 0.03])


def test_interval_is_student_t_where_every_donor_has_one_value():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    means = group_means(values, np.zeros(4, int), np.arange(4), 1, 4)
    low, high = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values))
    assert (means.mean[0], means.low[0], means.high[0]) == pytest.approx((4.0, low, high), rel=1e-12)
    assert means.num_clusters.tolist() == [4]


def test_interval_is_cluster_robust_by_hand_and_plain_with_two_donors():
    # residuals from the mean 3: donor 0 (-2,-1), donor 1 (0), donor 2 (+3); sums -3, 0, 3
    values, donors = np.array([1.0, 2.0, 3.0, 6.0]), np.array([0, 0, 1, 2])
    means = group_means(values, np.zeros(4, int), donors, 1, 3)
    half = scipy.stats.t.ppf(0.975, 2) * np.sqrt(18 * 3 / 2) / 4
    assert means.high[0] - means.mean[0] == pytest.approx(half, rel=1e-12)
    two = group_means(values, np.zeros(4, int), np.array([0, 0, 1, 1]), 1, 2)
    assert two.high[0] - 3 == pytest.approx(scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(values), rel=1e-12)
    single = group_means(np.array([5.0]), np.array([1]), np.array([0]), 2, 1)
    assert np.isnan(single.mean[0])
    assert single.mean[1] == 5
    assert np.isnan(single.low[1])


def test_cluster_interval_covers_the_truth_where_the_naive_one_does_not():
    rng = np.random.default_rng(3)
    num, donors, cells = 400, 8, 20
    values = rng.normal(size=(num, donors, 1)) + rng.normal(size=(num, donors, cells))  # true mean 0, donor sd 1
    group = np.repeat(np.arange(num), donors * cells)
    donor = np.tile(np.repeat(np.arange(donors), cells), num)
    means = group_means(values.ravel(), group, donor, num, donors)
    covered = ((means.low < 0) & (means.high > 0)).mean()
    assert 0.91 < covered < 0.99
    naive = group_means(values.ravel(), group, np.zeros_like(donor), num, 1)
    assert ((naive.low < 0) & (naive.high > 0)).mean() < 0.5


def test_sign_flip_by_hand_and_against_scipy():
    # |sum| = 6 is the largest of the 8 patterns, reached by 2 of them
    assert sign_flip(np.array([[1.0, 2.0, 3.0]]), 100, np.random.default_rng(0))[0] == 2 / 8
    means = np.random.default_rng(4).normal(0.4, 1, (5, 7))
    p = sign_flip(means, 1000, np.random.default_rng(0))
    for row, value in zip(means, p, strict=True):
        expected = scipy.stats.permutation_test(
            (row,), lambda x, axis: np.abs(x.mean(axis=axis)), permutation_type="samples", alternative="greater",
            n_resamples=np.inf, vectorized=True,
        )  # fmt: skip
        assert value == pytest.approx(expected.pvalue, rel=1e-9)
    drawn = sign_flip(means, 127, np.random.default_rng(0))  # fewer than 2**7: random patterns
    assert np.abs(drawn - p).max() < 0.15
    assert drawn.min() >= 1 / 128


def test_sign_flip_of_a_missing_donor_equals_leaving_it_out():
    row = np.array([0.5, 1.5, -0.2, 0.9])
    full = sign_flip(row[None], 1000, np.random.default_rng(0))
    holed = sign_flip(np.insert(row, 2, np.nan)[None], 1000, np.random.default_rng(0))
    assert full == holed
    assert np.isnan(sign_flip(np.array([[1.0, 2.0, np.nan]]), 1000, np.random.default_rng(0))[0])


def test_under_the_null_donor_level_p_is_uniform_and_cell_level_p_is_not():
    """Donors differ gene by gene, no gene has an effect: the pseudo-replicated test rejects too often, sign-flip does not."""
    rng = np.random.default_rng(5)
    genes, donors, cells = 600, 12, 15
    donor_effect = rng.normal(0, 1, (genes, donors))
    values = donor_effect[:, :, None] + rng.normal(0, 1, (genes, donors, cells))
    group = np.repeat(np.arange(genes), donors * cells)
    donor = np.tile(np.repeat(np.arange(donors), cells), genes)
    means, _ = cluster_means(values.ravel(), group, donor, genes, donors)
    p_donor = sign_flip(subtract_background(means), 10_000, rng)
    assert scipy.stats.kstest(p_donor, "uniform").pvalue > 0.01
    assert 0.03 < (p_donor < 0.05).mean() < 0.07
    _, p_cell = rank_sums(values.ravel(), group, genes)
    assert (p_cell < 0.05).mean() > 0.3


def test_planted_effects_are_found_at_donor_level():
    rng = np.random.default_rng(6)
    genes, planted, donors = 300, 30, 12
    effect = np.where(np.arange(genes) < planted, 1.5, 0.0)  # in donor standard deviations
    means = effect[:, None] + rng.normal(0, 1, (genes, donors))
    fdr = benjamini_hochberg(sign_flip(subtract_background(means), 10_000, rng))
    assert (fdr[:planted] < 0.1).mean() > 0.8
    assert (fdr[planted:] < 0.1).mean() < 0.05


def test_background_leaves_the_gene_itself_out():
    means = np.zeros((12, 3))
    means[:, 1] = 5.0  # a donor that moves with every gene
    means[4] += 1.1
    clean = subtract_background(means)
    assert clean[4] == pytest.approx([1.1] * 3)
    assert clean[0] == pytest.approx([-0.1] * 3)
    assert np.isnan(subtract_background(means[:10])).all()  # nine others are no background
    means[2:, 2] = np.nan
    assert np.isnan(subtract_background(means)[:, 2]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(subtract_background(means[:1])).all()  # no other gene


def test_percentile_is_taken_among_similar_genes_only():
    # two families: rank 1..30 with effects near 10, rank 1001..1030 with effects near 0
    rank = np.concatenate([np.arange(30), 1000 + np.arange(30)]).astype(float)
    effect = np.concatenate([10 + np.linspace(0, 1, 30), np.linspace(0, 1, 30)])
    features = np.stack([rank, np.ones(60)], axis=1)
    percentile = rank_adjustment.matched_percentile(effect, features, num_matched=10)
    assert percentile[10] == pytest.approx(50, abs=10)  # ordinary among its like, although above all of the others
    assert percentile[0] == 0
    effect[45] = 5
    assert rank_adjustment.matched_percentile(effect, features, num_matched=10)[45] == 100
    assert np.isnan(rank_adjustment.matched_percentile(effect[:10], features[:10])).all()
    same = rank_adjustment.matched_percentile(np.ones(40), np.ones((40, 2)), num_matched=10)
    assert (same == 50).all()  # 40 equal points: every one is compared with ten others


@pytest.mark.parametrize(("num_nulls", "most"), [(100, 0.15), (300, 0.09)])
def test_the_percentile_of_a_residual_is_fair_at_every_rank(num_nulls, most):
    """Effects fall with the square root of the rank, and so does their spread. Plain percentiles call all of ranks 3 and 10."""
    rng, unusual, plain = np.random.default_rng(num_nulls), [], []
    tested = np.array([3.0, 10, 40, 40, 200, 200, 1400, 1400])
    planted = np.array([0, 0, 0, 4, 0, 4, 0, 4])
    for _ in range(60):
        rank = np.concatenate([np.exp(rng.normal(5.5, 1, num_nulls)) + 1, tested])
        own = np.concatenate([np.zeros(num_nulls), planted])
        effect = (0.05 + 0.01 * (own + rng.normal(size=len(rank)))) / np.sqrt(rank)
        among, coverage = np.arange(len(rank)) < num_nulls, np.exp(-rank / 1500)
        scaled = rank_adjustment.scaled_residual(effect, np.log(rank), among)
        found = rank_adjustment.residual_percentile(effect, scaled, np.log(rank), coverage, among)[num_nulls:]
        of_all = rank_adjustment.matched_percentile(effect, np.stack([rank, coverage], axis=1), among)[num_nulls:]
        unusual.append(np.where(np.isnan(found), np.nan, np.abs(found - 50) > 47.5))
        plain.append(np.abs(of_all - 50) > 47.5)
    assert np.isnan(np.array(unusual)[:, :2]).mean() > 0.9  # no null is like ranks 3 and 10: nothing is said
    assert np.nanmean(np.array(unusual)[:, 2:][:, planted[2:] == 0]) < most  # 5 % would be right
    assert (np.nanmean(np.array(unusual)[:, planted == 4], axis=0) > 0.7).all()
    assert np.mean(np.array(plain)[:, :2]) > 0.5


def test_a_percentile_needs_ten_genes_of_like_rank_and_five_that_are_no_later():
    rng = np.random.default_rng(19)
    for earlier, later, known in ((4, 30, False), (5, 30, True), (5, 4, False), (5, 5, True)):
        rank = np.concatenate(
            [np.linspace(5, 9.9, earlier), np.linspace(11, 29, later), np.linspace(100, 200, 60), [10.0]]
        )
        among = np.arange(len(rank)) < len(rank) - 1
        effect = rng.normal(size=len(rank))
        scaled = rank_adjustment.scaled_residual(effect, np.log(rank), among)
        found = rank_adjustment.residual_percentile(effect, scaled, np.log(rank), np.ones(len(rank)), among)
        assert np.isfinite(found[-1]) == known, (earlier, later)


def test_rank_expectation_recovers_a_line_and_ignores_the_gene_itself():
    rng = np.random.default_rng(7)
    rank = rng.uniform(0, 2000, 200)
    line = 0.3 - rank / 1000
    assert rank_adjustment.expected_by_rank(line, rank) == pytest.approx(line, abs=1e-9)
    spiked = line.copy()
    spiked[50] += 9
    assert rank_adjustment.expected_by_rank(spiked, rank)[50] == pytest.approx(line[50], abs=1e-9)
    assert rank_adjustment.expected_by_rank(np.ones(30), np.full(30, 7.0)) == pytest.approx(1.0)  # one rank: the mean
    assert np.isnan(rank_adjustment.expected_by_rank(line[:10], rank[:10])).all()
    holed = np.where(np.arange(200) == 3, np.nan, line)
    assert np.isnan(rank_adjustment.expected_by_rank(holed, rank)[3])


@pytest.mark.parametrize("unit", [1.0, 1e-4, 1e4])
def test_an_outlier_does_not_bend_the_rank_expectation_in_any_unit(unit):
    rng = np.random.default_rng(17)
    rank = np.arange(200.0)
    line = unit * (1 - rank / 400 + 0.01 * rng.normal(size=200))
    spiked = line.copy()
    spiked[100] += 2 * unit
    found = rank_adjustment.expected_by_rank(spiked, rank)
    assert found == pytest.approx(unit * (1 - rank / 400), abs=0.02 * unit)
    assert np.delete(found, 100) == pytest.approx(
        np.delete(rank_adjustment.expected_by_rank(line, rank), 100), abs=0.005 * unit
    )


def test_welch_equals_scipy():
    rng = np.random.default_rng(8)
    a, b = rng.normal(0, 1, 9), rng.normal(1, 2, 14)
    ours = welch(*(np.array([[f(a)], [f(b)]]) for f in (len, np.mean, lambda v: np.var(v, ddof=1))))
    assert ours[0] == pytest.approx(scipy.stats.ttest_ind(b, a, equal_var=False).statistic, rel=1e-12)
    num, mean, none = np.array([[5.0] * 3, [5.0] * 3]), np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]), np.zeros((2, 3))
    assert welch(num, mean, none).tolist() == [np.inf, -np.inf, 0.0]  # a perfect mark of a state is no 0


def test_power_is_what_the_test_reaches_and_too_few_donors_have_none():
    assert sign_flip_power(5, 9.0) == 0.0  # the smallest p is 1/16
    assert smallest_detectable_effect(5) == np.inf
    assert smallest_detectable_effect(5, level=1 / 16) < 4
    assert sign_flip_power(6, 0.0) == pytest.approx(2 / 2**6, abs=0.015)  # only the two extreme patterns reject
    # 6 donors: rejected where all six have one sign
    assert sign_flip_power(6, 1.5) == pytest.approx(scipy.stats.norm.cdf(1.5) ** 6, abs=0.03)
    effects = [smallest_detectable_effect(n) for n in (6, 8, 12)]
    assert effects == sorted(effects, reverse=True)
    assert sign_flip_power(8, effects[1] + 0.1) > 0.8 > sign_flip_power(8, effects[1] - 0.1)


def test_few_donors_and_many_genes_cannot_pass_alone():
    # 8 donors: the smallest p is 1/128; with 1,000 genes 157 of them must reach it, and no fewer
    num = fewest_discoveries(smallest_p(8), 1000)
    p = np.ones(1000)
    p[: num - 1] = smallest_p(8)
    assert (benjamini_hochberg(p) > 0.05).all()
    p[num - 1] = smallest_p(8)
    assert (benjamini_hochberg(p) <= 0.05).sum() == num == 157


def test_rank_and_donor_together_explain_nothing_of_a_gene_s_own():
    rng = np.random.default_rng(10)
    rank = rng.uniform(0, 500, 120)
    slope = np.array([1.0, 2.0, 3.0])
    means = rank[:, None] * slope / 500
    means[7] += 0.4
    own = rank_adjustment.residual_after_rank(means, rank)
    assert own[7] == pytest.approx([0.4] * 3)
    assert np.abs(np.delete(own, 7, axis=0)).max() < 0.1
    few = rank_adjustment.residual_after_rank(means, np.where(np.arange(120) < 5, rank, np.nan))
    assert few == pytest.approx(subtract_background(means))


def test_genes_exchange_within_their_neighbourhood_only():
    rank = np.concatenate([np.arange(50.0), [np.nan] * 25])
    known = np.ones((75, 3), dtype=bool)
    known[:25:2, 2] = False
    to = rank_adjustment.permute_within_rank(rank, known, np.random.default_rng(11))
    for row in to:
        assert sorted(row.tolist()) == list(range(75))
    assert (to[:2] // 25 == np.arange(75) // 25).all()
    assert (to[0] != to[1]).any()
    assert (to[2][~known[:, 2]] == np.flatnonzero(~known[:, 2])).all()  # groups without a value keep their place
    assert known[to[2][known[:, 2]], 2].all()


@pytest.mark.parametrize("donors", [6, 8, 12])
def test_nothing_is_found_as_often_as_chance_finds_it_however_skewed_the_effects_are(donors):
    """2,450 genes of ten screens without a gene that repeats: effects are log-normal and follow steeply from rank, by donor.

    The share of p <= level must be what an exact sign flip gives, within the binomial's 99.9 %. Flips of the values
    themselves find more, a line through a third of all genes makes special genes of the first ranks.
    """
    rng = np.random.default_rng([20, donors])
    genes, rank = 245, np.arange(245.0)
    found, plain, stiff = [], [], []
    for _ in range(10):
        by_rank = np.exp(-rank / 40)[:, None] * rng.normal(6, 2, donors)
        means = by_rank + rng.lognormal(0, 1, (genes, donors))
        own = rank_adjustment.residual_after_rank(means, rank)
        found.append(sign_flip(rank_adjustment.normal_scores(own, rank), 5000, rng))
        plain.append(sign_flip(own, 5000, rng))
        wide = means - np.stack(
            [rank_adjustment.expected_by_rank(column, rank, span=0.3) for column in means.T], axis=1
        )
        stiff.append(sign_flip(rank_adjustment.normal_scores(wide, rank), 5000, rng)[:3])
    num = 10 * genes
    for level in (0.05, 0.2, 0.5):
        expected = attainable_level(donors, level)
        low, high = scipy.stats.binom.interval(0.999, num, expected)
        assert low <= (np.concatenate(found) <= level).sum() <= high
    assert (np.concatenate(plain) <= 0.5).sum() > scipy.stats.binom.interval(0.999, num, 0.5)[1]
    assert (np.concatenate(stiff) <= 0.05).mean() > 0.15


def test_normal_scores_are_places_among_genes_of_like_rank():
    own = np.array([[*range(30), *range(100, 130)]], dtype=float).T
    scores = rank_adjustment.normal_scores(own, np.arange(60.0), num_matched=10)
    assert scores[0, 0] == pytest.approx(scipy.stats.norm.ppf(0.5 / 11))
    assert scores[35, 0] == pytest.approx(scipy.stats.norm.ppf(5.5 / 11), abs=1e-12)
    assert scores[59, 0] == pytest.approx(-scores[0, 0])
    few = rank_adjustment.normal_scores(own[:13], np.arange(13.0))  # as many as there are
    assert few[12, 0] == pytest.approx(scipy.stats.norm.ppf(12.5 / 13))
    assert np.isnan(rank_adjustment.normal_scores(own[:11], np.arange(11.0), np.arange(11) < 5)).all()


def test_few_values_of_p_give_less_than_the_level():
    assert attainable_level(8) == 6 * 2 / 256
    assert attainable_level(5) == 0
    assert attainable_level(3, 0.25) == 0.25
    assert attainable_level(40) == pytest.approx(0.05)


def test_spearman_equals_scipy_on_the_pairs_that_are_there():
    rng = np.random.default_rng(30)
    a, b = np.round(rng.normal(size=40)), rng.normal(size=40)
    a[3], b[5] = np.nan, np.nan
    there = np.isfinite(a) & np.isfinite(b)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a[there], b[there]).statistic, rel=1e-12)
    assert spearman(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)
    assert np.isnan(spearman(np.arange(4.0), np.arange(4.0)))
    assert np.isnan(spearman(np.ones(9), np.arange(9.0)))
    assert np.isnan(spearman(np.arange(9.0), np.ones(9)))


def test_holm_equals_statsmodels_and_leaves_out_what_was_not_tested():
    p = np.array([0.04, np.nan, 0.01, 0.5, 0.012, 0.9, np.nan])
    found = holm(p)
    tested = np.isfinite(p)
    assert found[tested] == pytest.approx(multipletests(p[tested], method="holm")[1])
    assert np.isnan(found[~tested]).all()


def test_means_of_groups_and_of_clusters_by_hand():
    values, group, cluster = np.array([1.0, 3, 5, 7]), np.array([0, 0, 2, 0]), np.array([0, 1, 1, 1])
    assert means_by_group(values, group, 3) == pytest.approx([11 / 3, np.nan, 5], nan_ok=True)
    mean, num = cluster_means(values, group, cluster, 3, 2)
    assert num.tolist() == [[1, 2], [0, 0], [0, 1]]
    assert mean == pytest.approx(np.array([[1, 5], [np.nan, np.nan], [np.nan, 5]]), nan_ok=True)


def test_a_group_has_as_many_donors_as_have_values_of_it():
    values, group, donor = np.array([1.0, 3, 5, 7, 2]), np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 0, 0])
    means = group_means(values, group, donor, 2, 4)
    assert means.num_clusters.tolist() == [2, 1]
    assert means.num_values.tolist() == [2, 3]
    low, high = scipy.stats.t.interval(0.95, 1, 2.0, scipy.stats.sem([1.0, 3]))  # two donors: every value is its own
    assert (means.low[0], means.high[0]) == pytest.approx((low, high))


def test_an_interval_has_the_confidence_that_is_asked_for_and_needs_three_donors_to_count_them():
    values, donor = np.array([1.0, 2, 4, 9, 3, 5]), np.array([0, 0, 1, 1, 2, 2])
    group = np.zeros(6, int)
    means = group_means(values, group, donor, 1, 3, confidence=0.8)
    residual = values - 4
    sums = [residual[donor == d].sum() for d in range(3)]
    half = scipy.stats.t.ppf(0.9, 2) * np.sqrt(sum(v * v for v in sums) * 3 / 2) / 6
    assert (means.low[0], means.high[0]) == pytest.approx((4 - half, 4 + half))
    assert (means.num_values.tolist(), means.num_clusters.tolist()) == ([6], [3])
    two = group_means(np.array([1.0, 3]), np.zeros(2, int), np.array([0, 1]), 1, 2)
    low, high = scipy.stats.t.interval(0.95, 1, 2.0, scipy.stats.sem([1.0, 3]))
    assert (two.low[0], two.high[0]) == pytest.approx((low, high))


def test_flips_are_exact_up_to_the_number_that_is_allowed():
    means = np.random.default_rng(31).normal(0.3, 1, (40, 7))
    exact = sign_flip(means, 128, np.random.default_rng(0))
    assert (exact == sign_flip(means, 10_000, np.random.default_rng(1))).all()
    assert np.allclose(exact * 128 % 1, 0)
    assert np.allclose(exact * 64 % 1, 0)  # two-sided: a pattern and its opposite
    drawn = sign_flip(means, 127, np.random.default_rng(0))
    assert np.allclose(drawn * 128 % 1, 0)  # of 127 drawn patterns and the observed one
    assert (drawn != exact).any()
    assert (drawn != sign_flip(means, 127, np.random.default_rng(1))).any()


def test_patterns_that_are_equal_but_for_rounding_are_as_extreme():
    # 0.1 + 0.2 - 0.3 is not 0 in floating point: all eight patterns of (.1, .2, -.3) that sum to 0 count
    row = np.array([[0.1, 0.2, -0.3]])
    assert sign_flip(row, 100, np.random.default_rng(0))[0] == 1.0
    tied = np.array([[0.1, 0.2, 0.3, 0.4]])  # |sum| 1.0 only by two of 16
    assert sign_flip(tied, 100, np.random.default_rng(0))[0] == 2 / 16
    thirds = np.array([[0.1 + 0.2, -0.3, 1.0]])  # (.3, -.3, 1): |sum| is 1, 1, 1.6 or .4, each of two patterns
    assert sign_flip(thirds, 100, np.random.default_rng(0))[0] == 6 / 8


def test_smallest_p_and_levels_by_hand():
    assert [smallest_p(n) for n in (0, 1, 2, 3, 6)] == [1, 1, 0.5, 0.25, 1 / 32]
    assert attainable_level(6) == 1 / 32
    assert attainable_level(7, 1 / 64) == 1 / 64
    assert attainable_level(2, 0.6) == 0.5
    assert fewest_discoveries(1 / 128, 1280) == 200
    assert fewest_discoveries(1 / 128, 1281) == 201
    assert fewest_discoveries(1e-9, 10) == 1
    assert fewest_discoveries(0.25, 8, level=0.5) == 4


def test_rates_of_the_smallest_of_many_tests_are_those_of_all():
    p = np.random.default_rng(32).random(300) ** 3
    whole = benjamini_hochberg(p)
    few = np.sort(p)[:20]
    assert benjamini_hochberg(few, 300)[:5] == pytest.approx(np.sort(whole)[:5], rel=0.3)
    assert benjamini_hochberg(np.array([0.001, np.nan, 0.02]), 10) == pytest.approx([0.01, np.nan, 0.1], nan_ok=True)
    assert benjamini_hochberg(np.array([0.001, 0.02]), 1) == pytest.approx([0.002, 0.02])


def test_values_of_one_kind_say_nothing_and_groups_alone_have_nothing_to_compare_with():
    z, p = rank_sums(np.ones(6), np.array([0, 0, 1, 1, 2, 2]), 4)
    assert (z[:3].tolist(), p[:3].tolist()) == ([0, 0, 0], [1, 1, 1])
    assert np.isnan([z[3], p[3]]).all()  # a group without values
    z, p = rank_sums(np.array([1.0, 2, 3]), np.zeros(3, int), 1)
    assert np.isnan([z[0], p[0]]).all()
    z, _ = rank_sums(np.array([1.0, 2, 3]), np.zeros(3, int), 1, include_self=True)
    assert z[0] == 0


def test_welch_needs_two_values_on_each_side():
    num, mean, variance = np.array([[2.0, 1, 2], [2, 5, 1]]), np.array([[0.0] * 3, [1.0] * 3]), np.ones((2, 3))
    assert welch(num, mean, variance) == pytest.approx([1.0, np.nan, np.nan], nan_ok=True)


def test_rank_sums_of_groups_outside_the_pool_are_corrected_for_the_ties_of_both():
    rng = np.random.default_rng(33)
    groups = [np.round(rng.normal(i / 3, 1, n)) for i, n in enumerate((20, 9, 14, 6))]
    values, group = np.concatenate(groups), np.repeat(np.arange(4), [len(g) for g in groups])
    among = np.array([True, True, False, False])
    z, p = rank_sums(values, group, 4, among_G=among)
    for g, own in enumerate(groups):
        pool = np.concatenate([groups[k] for k in (0, 1) if k != g])
        expected = scipy.stats.mannwhitneyu(own, pool, method="asymptotic", use_continuity=False)
        assert p[g] == pytest.approx(expected.pvalue, rel=1e-9)
        assert np.sign(z[g]) == np.sign(expected.statistic - len(own) * len(pool) / 2)
