"""The cells of the shifts in `compare.shifts`: the two conditions, and the strata within which they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse import csgraph

from mixgf.arrays import Bools, Ints, Names
from mixgf.classification.labels import UNKNOWN, names_of
from mixgf.classification.splits import random_order
from mixgf.comparison.shift_matching import Shift
from mixgf.config.comparison import ShiftSpec
from mixgf.config.run import Config
from mixgf.corpus import obs_query
from mixgf.errors import UserError

MIN_STRATUM = 3
"""Fewest cells of each condition in a stratum that is used."""


def select_shifts(config: Config, obs: pd.DataFrame) -> list[Shift]:
    """The shifts of `compare.shifts`, as rows of `obs` (all cells of a corpus).

    Raises:
        UserError: An expression chooses nothing, cells of two species, or cells of both conditions; a condition is too small; or all
            shifts are of one species.
    """
    settings, label, found = config.compare, config.classify.label, list[Shift]()
    missing = [c for c in settings.within if c not in obs.columns]
    if missing:
        msg = f"compare.within: the corpus has no column {missing[0]!r}; it has {', '.join(map(str, obs.columns))}"
        raise UserError(msg)
    names = obs["cell"].to_numpy().astype(np.str_)
    for one in settings.shifts:
        species, both, after_N = _conditions(config, one, obs, names)
        strata = _text(config, obs, both, settings.within if one.within else ())
        made = _shift(config, one, species, names[both], after_N, strata)
        if made is None:
            sizes = f"{int((~after_N).sum())} cells before and {int(after_N.sum())} after"
            msg = (f"compare.shifts: {one.name}: of {sizes} fewer than compare.min_cells = {settings.min_cells} of either side are of strata that "
                   f"both have (compare.within = {','.join(settings.within)}); lower it, or --set compare.within=[]")  # fmt: skip
            raise UserError(msg)
        found.append(replace(made, rows_N=both[made.rows_N]))
        types = (
            _text(config, obs, both, (label,))
            if settings.by_type and one.within and label in obs.columns
            else strata[:0]
        )
        for kind in np.unique(types[types != UNKNOWN]).tolist() if len(np.unique(types)) > 1 else ():
            mine = np.flatnonzero(types == kind)
            part = replace(one, name=f"{one.name}: {kind}")
            made = _shift(config, part, species, names[both[mine]], after_N[mine], strata[mine])
            if made is not None:
                found.append(replace(made, rows_N=both[mine][made.rows_N]))
    if found and len({s.species for s in found}) < 2:
        msg = f"compare.shifts: all are of {found[0].species}; matching needs shifts of two species"
        raise UserError(msg)
    experiments = _experiments([obs["source"].iloc[s.rows_N].astype(str).unique().tolist() for s in found])
    return [replace(s, experiment=name) for s, name in zip(found, experiments, strict=True)]


def _experiments(sources: Sequence[Sequence[str]]) -> list[str]:
    """The experiment of each shift, from the data sets of its cells: shifts that share a data set are of one experiment."""
    names = sorted({source for one in sources for source in one})
    row = np.repeat(np.arange(len(sources)), [len(one) for one in sources])
    column = np.array([names.index(source) for one in sources for source in one], dtype=np.int64)
    shape = (len(sources), len(names))
    uses = sparse.csr_matrix((np.ones(len(row), dtype=np.int64), (row, column)), shape=shape)
    _, of = csgraph.connected_components(uses @ uses.T, directed=False)
    return [min(source for k in np.flatnonzero(of == number).tolist() for source in sources[k]) for number in of]


def _conditions(config: Config, one: ShiftSpec, obs: pd.DataFrame, names: Names) -> tuple[str, Ints, Bools]:
    """Species of a shift, rows of both conditions (N,), and which of them are of the second condition (N,)."""
    field = f"compare.shifts: {one.name}"
    before = obs_query.select_cells(obs, one.before, field)
    if one.after is None:
        order = before[random_order(names[before], "half", config.seed, one.name)]
        before, after = np.sort(order[::2]), np.sort(order[1::2])
    else:
        after = obs_query.select_cells(obs, one.after, field)
    both = np.concatenate([before, after])
    kinds = sorted(set(obs["species"].iloc[both].astype(str)))
    if len(kinds) > 1 or len(np.intersect1d(before, after)):
        why = f"cells of {' and '.join(kinds)}" if len(kinds) > 1 else "cells that are in both conditions"
        msg = f"{field}: must choose two different sets of cells of one species, not {why}"
        raise UserError(msg)
    return kinds[0], both, np.arange(len(both)) >= len(before)


def _text(config: Config, obs: pd.DataFrame, rows: Ints, columns: Sequence[str]) -> Names:
    """Values of some columns joined to one text per row."""
    texts = [names_of(obs[c].iloc[rows].tolist(), unknown=config.classify.unlabelled) for c in columns]
    return np.array([" / ".join(row) for row in zip(*texts, strict=True)] or [""] * len(rows), dtype=np.str_)


def _shift(config: Config, one: ShiftSpec, species: str, names: Names, after_N: Bools, strata: Names) -> Shift | None:  # noqa: PLR0917 (columns)
    """A shift with at most `shift_cells` cells of each condition, in strata that have both; None if too few cells are left."""
    settings = config.compare
    kinds, stratum_N = np.unique(strata, return_inverse=True)
    sizes = np.stack([np.bincount(stratum_N[after_N == side], minlength=len(kinds)) for side in (False, True)])
    enough = np.flatnonzero((sizes >= MIN_STRATUM).all(0))
    rows = []
    for side in (False, True):
        mine = np.flatnonzero((after_N == side) & np.isin(stratum_N, enough))
        order = mine[random_order(names[mine], "shift", config.seed)]
        rows.append(order[: settings.shift_cells or len(order)])
    kept = np.sort(np.concatenate(rows))
    both = [k for k in enough if len(np.unique(after_N[kept[stratum_N[kept] == k]])) == 2]
    kept = kept[np.isin(stratum_N[kept], both)]
    if min(int((after_N[kept] == side).sum()) for side in (False, True)) < settings.min_cells:
        return None
    return Shift(name=one.name, tag=one.tag, species=species, rows_N=kept, after_N=after_N[kept],
                 strata_N=stratum_N[kept].astype(np.int64), experiment="")  # fmt: skip


def cells_of(shifts: Sequence[Shift]) -> Ints:
    """All cells of some shifts, each once, ascending."""
    return np.unique(np.concatenate([s.rows_N for s in shifts])) if shifts else np.empty(0, dtype=np.int64)
