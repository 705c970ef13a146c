"""The choice after a screen: the best of every operation, a fair sample, and a check that can fail."""

import math

import numpy as np
import pytest

from mixgf.perturbation.screen_selection import STRATA, choose_shortlist, draw_similar, estimate_agreement
from mixgf.stats.donors import means_by_group

NAN = math.nan


def shortlist(estimates, *, top, sample, rng, nulls=0, direction="towards"):
    ranks = np.where(np.isfinite(estimates).any(axis=0), np.arange(estimates.shape[1], dtype=float), NAN)
    features = np.stack([ranks, ranks], axis=1)
    return choose_shortlist(
        estimates, features, top=top, sample=sample, nulls=nulls, direction=direction, rng=np.random.default_rng(rng)
    )


def test_the_best_of_every_operation_come_first_and_nothing_is_lost():
    first, second = np.arange(50.0), -np.arange(50.0)
    found = shortlist(np.stack([first, second]), top=3, sample=10, rng=1)
    best = [0, 49, 1, 48, 2, 47]  # best of the second, best of the first, and so on; ties by number
    assert found.top.tolist() == [k for k in best if k not in found.sample]
    assert len(set(found.sample.tolist())) == 10
    assert sorted([*found.sample, *found.top, *found.rest]) == list(range(50))
    again = shortlist(np.stack([first, second]), top=3, sample=10, rng=1)
    assert again.sample.tolist() == found.sample.tolist()


def test_a_gene_that_no_screened_cell_holds_comes_last():
    estimates = np.array([[NAN, 1.0, 3.0, 2.0]])
    features = np.arange(8.0).reshape(4, 2)
    found = choose_shortlist(
        estimates, features, top=1, sample=0, nulls=0, direction="towards", rng=np.random.default_rng(0)
    )
    assert found.top.tolist() == [2]
    assert found.rest.tolist() == [3, 1, 0]


def test_sets_have_no_estimate_and_are_always_scored_and_never_drawn():
    estimates = np.array([[NAN, 1.0, 3.0, NAN, 2.0]])
    found = shortlist(estimates, top=1, sample=0, rng=0)
    assert found.top.tolist() == [0, 3, 2]
    assert found.rest.tolist() == [4, 1]
    assert sorted(shortlist(estimates, top=1, sample=9, rng=0).sample) == [1, 2, 4]


def test_agreement_by_hand():
    exact = np.arange(20.0)
    same = estimate_agreement(exact * 2 + 1, exact)
    assert (same.spearman, same.recall, same.num_genes) == (pytest.approx(1.0), 1.0, 20)
    opposite = estimate_agreement(-exact, exact)
    assert (opposite.spearman, opposite.recall) == (pytest.approx(-1.0), 0.0)
    half = exact.copy()
    half[19] = -1  # one of the two best is estimated as the worst
    assert estimate_agreement(half, exact).recall == 0.5


def test_genes_without_either_value_are_left_out_and_what_does_not_differ_never_agrees():
    assert estimate_agreement(np.array([1.0, NAN, 3, 4]), np.array([1.0, 2, 3, 4])).num_genes == 3
    assert not estimate_agreement(np.ones(30), np.arange(30.0)).reaches(-1.0)
    assert not estimate_agreement(np.array([NAN] * 4), np.arange(4.0)).reaches(-1.0)


def test_means_by_gene():
    found = means_by_group(np.array([1.0, 3, 5]), np.array([2, 2, 0]), 3)
    assert found[[0, 2]].tolist() == [5.0, 2.0]
    assert math.isnan(found[1])


def test_genes_that_move_cells_away_are_looked_for_as_well_unless_one_direction_is_asked():
    estimates = np.random.default_rng(2).permutation(np.arange(-25.0, 25.0))[None]
    order = np.argsort(-estimates[0]).tolist()
    assert shortlist(estimates, top=4, sample=0, rng=0).top.tolist() == order[:4]
    assert shortlist(estimates, top=4, sample=0, rng=0, direction="away").top.tolist() == order[::-1][:4]
    both = shortlist(estimates, top=5, sample=0, rng=0, direction="both").top.tolist()
    assert sorted(both) == sorted(order[:3] + order[-3:])
    assert {*both[:2]} == {order[0], order[-1]}  # the best of either end come first


def test_the_company_is_drawn_from_the_strata_of_the_best_whatever_its_own_estimates():
    """Over many draws a gene's chance depends on its stratum alone: as high for the chosen as for the others there."""
    rng = np.random.default_rng(3)
    features = np.stack([rng.permutation(200.0 + np.arange(200)), np.zeros(200)], axis=1)
    early = np.flatnonzero(features[:, 0] < 200 + 200 // STRATA)
    wanted, taken = early[:12], early[12:14]
    times = np.zeros(200)
    for _ in range(400):
        drawn = draw_similar(features, wanted, 10, taken=taken, rng=rng)
        assert len(drawn) == len(set(drawn.tolist())) == 10
        times[drawn] += 1
    assert times.sum() == times[early].sum()
    assert (times[taken] == 0).all()
    expected = 400 * 10 / (len(early) - 2)
    assert times[wanted].mean() == pytest.approx(expected, rel=0.15)
    assert times[early[14:]].mean() == pytest.approx(expected, rel=0.15)


def test_everything_drawn_is_scored_and_the_draws_share_follows_the_best():
    estimates = np.concatenate([np.full(50, 5.0) + np.arange(50), np.arange(150) / 1000])[None]
    found = shortlist(estimates, top=30, sample=10, rng=4, nulls=20)
    assert np.isin(found.drawn, [*found.sample, *found.top, *found.matched]).all()
    assert len(found.drawn) == 30
    assert np.isin(found.drawn, found.top).any()
    assert not np.isin(found.matched, found.top).any()
    assert sorted([*found.sample, *found.top, *found.matched, *found.rest]) == list(range(200))
    assert (np.setdiff1d(found.drawn, found.sample) < 200 * 2 // STRATA).all()  # the best are the first fifty
    assert not len(
        draw_similar(np.full((5, 2), NAN), np.array([1]), 3, taken=np.array([], int), rng=np.random.default_rng(0))
    )


def test_agreement_needs_three_genes_that_differ_and_looks_for_a_tenth_among_a_fifth():
    two = estimate_agreement(np.array([1.0, 2]), np.array([1.0, 2]))
    assert math.isnan(two.spearman)
    assert math.isnan(two.recall)
    assert estimate_agreement(np.array([1.0, 2, 4]), np.array([1.0, 2, 3])).spearman == pytest.approx(1.0)
    assert math.isnan(estimate_agreement(np.arange(5.0), np.ones(5)).spearman)
    exact = np.arange(21.0)  # its top are three genes, looked for among six
    estimate = exact.copy()
    estimate[[20, 19]] = [15.5, 13.5]  # places four and seven
    assert estimate_agreement(estimate, exact).recall == pytest.approx(2 / 3)
    assert estimate_agreement(exact, exact).reaches(1.0 - 1e-9)


def test_strata_are_fifths_of_each_feature_and_shares_add_up():
    features = np.stack([np.arange(100.0), np.arange(100.0)[::-1]], axis=1)
    wanted = np.array([0, 1, 2, 25, 99])  # three in the first fifth, one each in the second and the last
    drawn = draw_similar(features, wanted, 10, taken=np.array([], int), rng=np.random.default_rng(0))
    assert np.bincount(drawn // 20, minlength=5).tolist() == [6, 2, 0, 0, 2]
    drawn = draw_similar(features, wanted, 7, taken=np.array([], int), rng=np.random.default_rng(0))
    assert len(drawn) == 7
    every = draw_similar(features, wanted, 500, taken=np.array([3, 4]), rng=np.random.default_rng(0))
    assert every.tolist() == [k for k in range(100) if k // 20 in {0, 1, 4} and k not in {3, 4}]
    both = np.stack([np.arange(100.0), np.arange(100.0)], axis=1)  # the lowest fifth of both features is a stratum, too
    drawn = draw_similar(both, np.array([0, 1, 50]), 6, taken=np.array([], int), rng=np.random.default_rng(0))
    assert np.bincount(drawn // 20, minlength=5).tolist() == [4, 0, 2, 0, 0]
    one = np.stack([np.arange(100.0), np.arange(100) % 2 * 1.0], axis=1)  # two features: a gene's stratum is of both
    drawn = draw_similar(one, np.array([0, 2]), 500, taken=np.array([], int), rng=np.random.default_rng(0))
    assert drawn.tolist() == list(range(0, 20, 2))
    for none in (
        draw_similar(features, wanted, 0, taken=wanted[:0], rng=np.random.default_rng(0)),
        draw_similar(features, wanted[:0], 5, taken=wanted[:0], rng=np.random.default_rng(0)),
    ):
        assert not len(none)


def test_sets_among_the_wanted_draw_nothing_like_them():
    features = np.arange(40.0)[:, None].repeat(2, 1)
    features[7] = NAN
    drawn = draw_similar(features, np.array([7, 30]), 6, taken=np.array([], int), rng=np.random.default_rng(0))
    assert len(drawn) == 6
    assert 7 not in drawn
    assert (np.abs(drawn - 28) <= 5).all()


def test_with_two_operations_and_both_directions_each_end_gets_half_of_the_number():
    rng = np.random.default_rng(5)
    estimates = rng.normal(size=(2, 60))
    found = shortlist(estimates, top=3, sample=0, rng=0, direction="both")
    ends = [np.argsort(sign * row)[:2] for row in estimates for sign in (1, -1)]  # two of each end: 3 / 2, rounded up
    assert sorted(found.top.tolist()) == sorted(set(np.concatenate(ends).tolist()))
    assert len(found.rest) == 60 - len(found.top)


def test_a_gene_with_an_estimate_of_one_operation_takes_part_and_is_drawn():
    estimates = np.array([[NAN, 5.0, 1, 2], [9.0, NAN, 3, 4]])
    found = shortlist(estimates, top=1, sample=0, rng=0)
    assert found.top.tolist() == [0, 1]
    assert found.rest.tolist() == [3, 2]
    assert shortlist(estimates, top=1, sample=9, rng=0).sample.tolist() == [0, 1, 2, 3]


def test_the_genes_like_the_best_are_like_those_of_the_sample_too():
    """The best of the sample count among the wanted, since they are as extreme."""
    estimates = np.arange(100.0)[None]  # gene 99 is the best; features follow the number
    found = shortlist(estimates, top=20, sample=100, rng=0, nulls=10)
    assert not len(found.matched)
    assert found.drawn.tolist() == list(range(100))
    found = shortlist(estimates, top=20, sample=50, rng=0, nulls=8)
    alike = np.setdiff1d(found.drawn, found.sample)
    assert len(alike) == 8
    assert (alike >= 80).all()
