"""Choosing cells: what is misspelt is said, and a sample is balanced and repeatable."""

import numpy as np
import pandas as pd
import pytest

from mixgf.corpus import obs_query
from mixgf.errors import UserError
from mixgf.perturbation import sampling

OBS = pd.DataFrame(
    {
        "cell_type": ["alpha", "beta", "alpha", None, "ductal"],
        "donor": ["d1", "d1", "d2", "d2", "d3"],
        "n_counts": [100, 200, 300, 400, 500],
    }
)


@pytest.mark.parametrize(
    ("expression", "cells"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("cell_type == 'alpha'", [0, 2]),
        ("cell_type == 'alpha' and donor != 'd1'", [2]),
        ("cell_type in ['beta', 'ductal'] or n_counts > 350", [1, 3, 4]),
        ("not (donor == 'd1')", [2, 3, 4]),
    ],
)
def test_expressions_select_cells(expression, cells):
    assert obs_query.select_cells(OBS, expression, "perturb.start").tolist() == cells


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("tissue == 'x'", r"perturb\.start = .*'tissue' is not defined; columns: cell_type, donor, n_counts"),
        ("cell_type == 'alfa'", r"perturb\.start: cell_type has no value 'alfa'; did you mean one of alpha"),
        ("cell_type in ['alpha', 'bta']", r"cell_type has no value 'bta'; did you mean one of .*beta"),
        ("cell_type == 'beta' and donor == 'd3'", r"no cell of the corpus fits"),
        ("cell_type = 'alpha'", r"cannot be read"),
        ("cell_type ==", r"cannot be read"),
        ("n_counts + 1", r"must be true or false for each cell"),
        ("cell_type > 3", r"cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_said(expression, message):
    with pytest.raises(UserError, match=message):
        obs_query.select_cells(OBS, expression, "perturb.start")


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
