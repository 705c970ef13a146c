"""Cells chosen by an expression over their obs columns, and a balanced sample of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from mixgf import rng
from mixgf.arrays import Ints

_KEY = 91
"""Separates the draws made here from other draws of the same seed."""


def match_rows(features_GF: NDArray[np.float64], wanted: list[int], num: int, seed: int) -> list[int]:
    """For each wanted row in round_ the nearest row not yet taken, until `num` are: rows like the wanted ones.

    Near is meant in the ranks of the features; equally near rows come in a keyed random order. No wanted row is taken.
    """
    ranks_GF = np.stack([rankdata(column) for column in features_GF.T], axis=1)
    order = np.argsort(rng.hashed(seed, _KEY + 1, np.arange(len(features_GF))), kind="stable")
    free = np.ones(len(features_GF), dtype=bool)
    free[wanted] = False
    num = min(num, int(free.sum())) if wanted else 0
    near = [order[np.argsort(np.abs(ranks_GF[order] - ranks_GF[row]).sum(axis=1), kind="stable")] for row in wanted]
    taken: list[int] = []
    places = [0] * len(wanted)
    while len(taken) < num:
        round_ = len(taken) % len(wanted)
        while not free[near[round_][places[round_]]]:
            places[round_] += 1
        row = int(near[round_][places[round_]])
        free[row] = False
        taken.append(row)
    return taken


def sample_cells(cells: Ints, donor_of: Ints, num: int, seed: int) -> Ints:
    """At most `num` cells (0 = all), balanced over donors: one of each donor in round_, in a keyed random order."""
    if num <= 0 or num >= len(cells):
        return cells
    order = cells[np.argsort(rng.hashed(seed, _KEY, cells), kind="stable")]
    round_ = pd.Series(donor_of[order]).groupby(donor_of[order]).cumcount().to_numpy()
    return np.sort(order[np.argsort(round_, kind="stable")][:num])
