"""Samples: cells balanced over donors, and rows (genes) that resemble given ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from mixgf import rng
from mixgf.arrays import Ints

_KEY = 91
"""Random key of this module's draws."""


def match_rows(features_GF: NDArray[np.float64], wanted: list[int], num: int, seed: int) -> list[int]:
    """Rows that resemble the wanted ones: for each wanted row in turn the nearest free row, until there are `num`.

    Distance is measured in ranks of the features; ties are in random order. Wanted rows are never chosen.
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
        which = len(taken) % len(wanted)
        while not free[near[which][places[which]]]:
            places[which] += 1
        row = int(near[which][places[which]])
        free[row] = False
        taken.append(row)
    return taken


def sample_cells(cells: Ints, donor_of: Ints, num: int, seed: int) -> Ints:
    """At most `num` cells (0 = all), balanced over donors: one random cell of each donor in turn."""
    if num <= 0 or num >= len(cells):
        return cells
    order = cells[np.argsort(rng.hashed(seed, _KEY, cells), kind="stable")]
    number_in_donor = pd.Series(donor_of[order]).groupby(donor_of[order]).cumcount().to_numpy()
    return np.sort(order[np.argsort(number_in_donor, kind="stable")][:num])


def split_cells(cells: Ints, donor_of: Ints, seed: int) -> tuple[Ints, Ints]:
    """Two random halves of the cells, and of every donor's cells as nearly as can be; each ascending, the first not smaller."""
    order = cells[np.lexsort((rng.hashed(seed, _KEY + 2, cells), donor_of[cells]))]
    return np.sort(order[::2]), np.sort(order[1::2])
