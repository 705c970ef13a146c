"""Choose cells by an expression over their metadata (obs)."""

from __future__ import annotations

import ast
from difflib import get_close_matches

import numpy as np
import pandas as pd

from mixgf.arrays import Ints
from mixgf.errors import UserError


def select_cells(obs: pd.DataFrame, expression: str, field: str) -> Ints:
    """Numbers of the cells for which an expression over `obs` is true, int64, ascending.

    Args:
        obs: one row per cell.
        expression: in pandas query syntax, for example `cell_type == 'alpha cell'`; empty = all cells.
        field: config field that holds the expression, for messages.

    Raises:
        UserError: an unknown column, a value that does not occur in its column, wrong syntax, or no matching cell.
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
    """Raise if a string compared by == or in does not occur in its column: a typing error would match no cell."""
    for node in ast.walk(ast.parse(expression, mode="eval")):
        if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Name)):
            continue
        column, operator, right = node.left.id, node.ops[0], node.comparators[0]
        if column not in obs.columns or not isinstance(operator, ast.Eq | ast.In):
            continue
        parts = right.elts if isinstance(right, ast.List | ast.Tuple) else [right]
        present = set(obs[column].dropna().astype(str))
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value not in present:
                near = get_close_matches(part.value, present, n=3) or sorted(present)[:8]
                msg = f"{field}: {column} has no value {part.value!r}; did you mean one of {', '.join(near)}?"
                raise UserError(msg)
