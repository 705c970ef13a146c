"""Negative controls of a perturbation: false goals, and what an untrained encoder finds.

All donors are read by one encoder, so an effect that means nothing for the goal also repeats over donors. Two controls show how often:

| control | what is exchanged | cost |
|---|---|---|
| false goals | the goal, for a direction in which the start cells differ among themselves | none: the perturbed sentences are the same |
| untrained twin | the encoder, for one of the same sizes with the weights before training | that of the run |

A false goal is made of two random halves of the start cells, halves of donors where there are enough of them. The difference
between the halves' mean vectors is the direction. It is added to the mean of the start cells and scaled to the distance of the true goal.

Letters: S states, D width, N cells.
"""

from __future__ import annotations

import numpy as np

from mixgf import rng
from mixgf.arrays import Float64s, Ints

NUM_FALSE = 10
"""False goals. The first is reported as a control; residuals towards all are the null of the hits."""
FALSE = "false_goal_"
"""Begin of the names of their states."""
MIN_HALVED = 6
"""Fewest donors of which halves are taken: six have ten different pairs of halves. With fewer, halves are of cells."""
MIN_CELLS = 10
"""Fewest start cells for false goals."""
_KEY = 95


def halves(cells: Ints, donor_of: Ints, named: Ints, seed: int, *, num: int = NUM_FALSE) -> list[Ints]:
    """Random halves of the start cells, `num` of them; the other half are the cells left.

    Args:
        cells: the start cells.
        donor_of: donor code of every cell of the corpus.
        named: codes of the donors with a name.
        seed: of the draws.
        num: number of halves.

    Returns:
        No halves with fewer than `MIN_CELLS` cells.
    """
    if len(cells) < MIN_CELLS:
        return []
    donors = np.intersect1d(donor_of[cells], named)
    by_donor = len(donors) >= MIN_HALVED
    unit_N = donor_of[cells] if by_donor else cells
    units = donors if by_donor else cells
    found: list[Ints] = []
    seen: set[tuple[int, ...]] = set()
    draw = 0
    while len(found) < num:
        order = units[np.argsort(rng.hashed(seed, _KEY, draw, units), kind="stable")]
        mine = np.sort(order[: len(units) // 2])
        other = np.setdiff1d(units, mine)
        names = {tuple(mine.tolist()), tuple(other.tolist())}
        draw += 1
        if by_donor and names & seen and draw < 100 * num:
            continue
        seen |= names
        found.append(cells[np.isin(unit_N, mine)])
    return found


def place_false_goals(means_SD: Float64s, names: list[str], sizes_S: Ints) -> Float64s:
    """State embeddings in which the mean of each half gives way to its false goal (see the module).

    Args:
        means_SD: mean vectors of the states.
        names: of the states.
        sizes_S: cells of each state.
    """
    placed_SD = means_SD.copy()
    if "goal" not in names:
        return placed_SD
    start, goal = names.index("start"), names.index("goal")
    distance = float(np.linalg.norm(means_SD[goal] - means_SD[start]))
    for s in false_goals(names):
        # the halves make up the start cells: mean - mean of the other half is this multiple of mean - start
        away_D = (means_SD[s] - means_SD[start]) * sizes_S[start] / (sizes_S[start] - sizes_S[s])
        size = float(np.linalg.norm(away_D))
        if size > 0:
            placed_SD[s] = means_SD[start] + away_D / size * distance
    return placed_SD


def false_goals(names: list[str]) -> list[int]:
    """Numbers of the states that are false goals."""
    return [s for s, name in enumerate(names) if name.startswith(FALSE)]
