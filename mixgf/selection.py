"""Cells chosen by an expression over their obs columns, and a balanced sample of them."""

from __future__ import annotations

import ast
from difflib import get_close_matches
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from mixgf import keyed
from mixgf.config import UserError

Ints: TypeAlias = NDArray[np.int64]

_KEY = 91
"""Separates the draws made here from other draws of the same seed."""


def select(obs: pd.DataFrame, expression: str, field: str) -> Ints:
    """Numbers of the cells that fit an expression over `obs` (pandas query syntax); empty = all cells.

    Raises:
        UserError: an unknown column, a value that its column does not hold, broken syntax, or no cell at all.
    """
    if not expression.strip():
        return np.arange(len(obs), dtype=np.int64)
    columns = ", ".join(map(str, obs.columns))
    try:
        _check_values(obs, expression, field)
        chosen = obs.eval(expression, engine="python")
    except UserError:
        raise
    except pd.errors.UndefinedVariableError as error:
        msg = f"{field} = {expression!r}: {error}; columns: {columns}"
        raise UserError(msg) from None
    except (SyntaxError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        msg = f"{field} = {expression!r}: cannot be read ({error}); write for example cell_type == 'alpha' and donor != 'd1'"
        raise UserError(msg) from None
    if not (isinstance(chosen, pd.Series) and chosen.dtype == bool):
        msg = f"{field} = {expression!r}: must be true or false for each cell, for example cell_type == 'alpha'"
        raise UserError(msg)
    cells = np.flatnonzero(chosen.to_numpy()).astype(np.int64)
    if not len(cells):
        msg = f"{field} = {expression!r}: no cell of the corpus fits; columns: {columns}"
        raise UserError(msg)
    return cells


def _check_values(obs: pd.DataFrame, expression: str, field: str) -> None:
    """A misspelt value silently selects nothing: every text compared with == or in must occur in its column."""
    for node in ast.walk(ast.parse(expression, mode="eval")):
        if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Name)):
            continue
        column, operator, right = node.left.id, node.ops[0], node.comparators[0]
        if column not in obs.columns or not isinstance(operator, ast.Eq | ast.In):
            continue
        parts = right.elts if isinstance(right, ast.List | ast.Tuple) else [right]
        known = set(obs[column].dropna().astype(str))
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value not in known:
                near = get_close_matches(part.value, known, n=3) or sorted(known)[:8]
                msg = f"{field}: {column} has no value {part.value!r}; did you mean one of {', '.join(near)}?"
                raise UserError(msg)


def matched(features_GF: NDArray[np.float64], wanted: list[int], num: int, seed: int) -> list[int]:
    """For each wanted row in turn the nearest row not yet taken, until `num` are: rows like the wanted ones.

    Near is meant in the ranks of the features; equally near rows come in a keyed random order. No wanted row is taken.
    """
    ranks_GF = np.stack([rankdata(column) for column in features_GF.T], axis=1)
    order = np.argsort(keyed.hashed(seed, _KEY + 1, np.arange(len(features_GF))), kind="stable")
    free = np.ones(len(features_GF), dtype=bool)
    free[wanted] = False
    num = min(num, int(free.sum())) if wanted else 0
    near = [order[np.argsort(np.abs(ranks_GF[order] - ranks_GF[row]).sum(axis=1), kind="stable")] for row in wanted]
    taken: list[int] = []
    places = [0] * len(wanted)
    while len(taken) < num:
        turn = len(taken) % len(wanted)
        while not free[near[turn][places[turn]]]:
            places[turn] += 1
        row = int(near[turn][places[turn]])
        free[row] = False
        taken.append(row)
    return taken


def sample(cells: Ints, donor_of: Ints, num: int, seed: int) -> Ints:
    """At most `num` cells (0 = all), balanced over donors: one of each donor in turn, in a keyed random order."""
    if num <= 0 or num >= len(cells):
        return cells
    order = cells[np.argsort(keyed.hashed(seed, _KEY, cells), kind="stable")]
    turn = pd.Series(donor_of[order]).groupby(donor_of[order]).cumcount().to_numpy()
    return np.sort(order[np.argsort(turn, kind="stable")][:num])
