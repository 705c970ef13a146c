"""A sample of cells is balanced over donors and repeatable."""

import numpy as np

from mixgf.perturbation import sampling


def test_a_sample_is_balanced_over_donors_repeatable_and_independent_of_the_other_cells():
    donor_of = np.repeat([0, 1, 2], [50, 5, 20])
    cells = np.arange(75)
    chosen = sampling.sample_cells(cells, donor_of, 24, seed=1)
    assert np.bincount(donor_of[chosen]).tolist() == [10, 5, 9]
    assert len(set(chosen.tolist())) == 24
    assert (chosen == np.sort(chosen)).all()
    assert (sampling.sample_cells(cells[::-1].copy(), donor_of, 24, seed=1) == chosen).all()
    assert (sampling.sample_cells(cells, donor_of, 24, seed=2) != chosen).any()
    smaller = sampling.sample_cells(cells, donor_of, 9, seed=1)
    assert set(smaller.tolist()) <= set(chosen.tolist())  # a longer run extends a shorter one
    for num in (0, 75, 100):
        assert sampling.sample_cells(cells, donor_of, num, seed=1).tolist() == cells.tolist()


def test_matched_rows_are_the_nearest_that_are_free():
    features = np.array([[0.0, 0], [10, 1], [11, 1], [12, 1], [500, 9], [501, 9], [502, 9]])
    assert set(sampling.match_rows(features, [2, 5], 4, 0)) == {1, 3, 4, 6}
    assert sampling.match_rows(features, [2, 5], 2, 0)[1] in (4, 6)  # one for each in turn
    assert len(sampling.match_rows(features, [2], 99, 0)) == 6
    assert sampling.match_rows(features, [], 5, 0) == []
    same = np.zeros((40, 2))
    first, second = (sampling.match_rows(same, [0], 5, seed) for seed in (1, 2))
    assert first != second  # equal rows are drawn, not counted off
    assert first == sampling.match_rows(same, [0], 5, 1)
