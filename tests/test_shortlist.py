"""The choice after a screen: the best of every operation, a fair sample, and a check that can fail."""

import math

import numpy as np
import pytest

from mixgf.shortlist import agreement, shortlist
from mixgf.stats import mean_by

NAN = math.nan


def test_the_best_of_every_operation_come_first_and_nothing_is_lost():
    first, second = np.arange(50.0), -np.arange(50.0)
    found = shortlist(np.stack([first, second]), top=3, sample=10, rng=np.random.default_rng(1))
    best = [0, 49, 1, 48, 2, 47]  # best of the second, best of the first, and so on; ties by number
    assert found.top.tolist() == [k for k in best if k not in found.sample]
    assert len(set(found.sample.tolist())) == 10
    assert sorted([*found.sample, *found.top, *found.rest]) == list(range(50))
    again = shortlist(np.stack([first, second]), top=3, sample=10, rng=np.random.default_rng(1))
    assert again.sample.tolist() == found.sample.tolist()


def test_sets_have_no_estimate_and_are_always_scored_and_never_drawn():
    estimates = np.array([[NAN, 1.0, 3.0, NAN, 2.0]])
    found = shortlist(estimates, top=1, sample=0, rng=np.random.default_rng(0))
    assert found.top.tolist() == [0, 3, 2]
    assert found.rest.tolist() == [4, 1]
    assert sorted(shortlist(estimates, top=1, sample=9, rng=np.random.default_rng(0)).sample) == [1, 2, 4]


def test_agreement_by_hand():
    exact = np.arange(20.0)
    same = agreement(exact * 2 + 1, exact)
    assert (same.spearman, same.recall, same.num_genes) == (pytest.approx(1.0), 1.0, 20)
    opposite = agreement(-exact, exact)
    assert (opposite.spearman, opposite.recall) == (pytest.approx(-1.0), 0.0)
    half = exact.copy()
    half[19] = -1  # one of the two best is estimated as the worst
    assert agreement(half, exact).recall == 0.5


def test_genes_without_either_value_are_left_out_and_what_does_not_differ_never_agrees():
    assert agreement(np.array([1.0, NAN, 3, 4]), np.array([1.0, 2, 3, 4])).num_genes == 3
    assert not agreement(np.ones(30), np.arange(30.0)).reaches(-1.0)
    assert not agreement(np.array([NAN] * 4), np.arange(4.0)).reaches(-1.0)


def test_means_by_gene():
    found = mean_by(np.array([1.0, 3, 5]), np.array([2, 2, 0]), 3)
    assert found[[0, 2]].tolist() == [5.0, 2.0]
    assert math.isnan(found[1])
