"""Choose cells by an expression over their metadata (obs).

The language is that of `mixgf.config.expressions`. Values are compared as follows.

| column holds | compared with |
|---|---|
| text, categories, anything else | text; `<` goes by code points |
| numbers | numbers, in the column's own precision |
| true and false | `True`, `False`, 0, 1 |

A missing value equals nothing and has no order: `==`, `in`, `<` and a column alone are false for it; `!=`, `not in` and `not`
are their opposites, so true. `x == x` chooses the cells that have a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.arrays import Ints
from mixgf.config.expressions import (
    SHOWN,
    Column,
    Compare,
    Expression,
    Joined,
    Not,
    Value,
    literal,
    parse_expression,
    quoted,
    shortened,
)
from mixgf.console import warn
from mixgf.errors import UserError

_ARROW = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_NAMED = 30
"""Most names that a message lists."""


def select_cells(obs: pd.DataFrame, expression: str, field: str) -> Ints:
    """Numbers of the cells for which an expression over `obs` is true, int64, ascending.

    Args:
        obs: one row per cell.
        expression: for example `cell_type == 'alpha cell'`; empty = all cells.
        field: config field that holds the expression, for messages.

    Raises:
        UserError: an unknown column, a value that does not occur in its column, text compared with a number, wrong syntax, or no
            matching cell.
    """
    if not expression.strip():
        return np.arange(len(obs), dtype=np.int64)
    chosen = _Query(obs, expression, field).true_of(parse_expression(expression, field))
    cells = np.flatnonzero(chosen.to_numpy(zero_copy_only=False)).astype(np.int64)
    if not len(cells):
        msg = (
            f"{field} = {shortened(expression)}: no cell of the corpus fits; columns: {_listed(map(str, obs.columns))}"
        )
        raise UserError(msg)
    return cells


def equals(obs: pd.DataFrame, column: str, text: str) -> str:
    """The expression that chooses the cells whose value in a column, as text, is `text`, which occurs there."""
    if _kind(_array(obs[column]).type) == "text":
        return f"{quoted(column)} == {literal(text)}"
    found = next(value for value in obs[column].dropna().unique() if str(value) == text)
    return f"{quoted(column)} == {literal(found.item() if isinstance(found, np.generic) else found)}"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_NAMED]) + (f" and {len(every) - _NAMED} more" if len(every) > _NAMED else "")


class _Query:
    """Evaluates one expression. Truth is never missing."""

    def __init__(self, obs: pd.DataFrame, expression: str, field: str) -> None:
        self.obs, self.expression, self.field = obs, expression, field
        self.read: dict[str, pa.Array] = {}

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.field} = {shortened(self.expression)}: {why}")

    def true_of(self, node: Expression) -> pa.Array:
        """Which cells the expression is true for, (N,) without nulls."""
        if isinstance(node, Not):
            return pc.invert(self.true_of(node.item))
        if isinstance(node, Joined):
            join = pc.and_ if node.word == "and" else pc.or_
            found = self.true_of(node.items[0])
            for item in node.items[1:]:
                found = join(found, self.true_of(item))
            return found
        if isinstance(node, Compare):
            negative = {"!=": "==", "not in": "in"}.get(node.operator)
            found = self.compared(node, negative or node.operator).fill_null(False)
            return pc.invert(found) if negative else found
        column = self.column(node.name)
        if not pa.types.is_boolean(column.type):
            raise self.refuse(f"{quoted(node.name)} must be true or false for each cell; compare it with a value")
        return column.fill_null(False)

    def compared(self, node: Compare, operator: str) -> pa.Array:
        """A comparison, null where a side is missing."""
        column = self.column(node.column.name)
        if isinstance(node.other, Column):
            return self.compared_columns(node, operator)
        values = node.other if isinstance(node.other, tuple) else (node.other,)
        scalars = [self.scalar(node, column, value) for value in values]
        if operator in {"==", "in"}:
            self.check_values(node.column.name, column, values)
            equal = [s for s in scalars if s is not None]
            found = pc.is_in(column, value_set=pa.array([s.as_py() for s in equal], column.type))
            return pc.and_(found, column.is_valid())
        if scalars[0] is None:  # beyond the range of the column's whole numbers
            beyond = float(values[0])
            return _ARROW[operator](pc.cast(column, pa.float64(), safe=False), beyond)
        return _ARROW[operator](column, scalars[0])

    def compared_columns(self, node: Compare, operator: str) -> pa.Array:
        assert isinstance(node.other, Column)
        one, other = self.column(node.column.name), self.column(node.other.name)
        kinds = {_kind(one.type), _kind(other.type)}
        if len(kinds) > 1:
            raise self.refuse(
                f"{quoted(node.column.name)} holds {_kind(one.type)}, {quoted(node.other.name)} holds "
                f"{_kind(other.type)}; both must hold the same"
            )
        if kinds == {"numbers"} and one.type != other.type:
            one, other = (pc.cast(c, pa.float64(), safe=False) for c in (one, other))
        return _ARROW[operator](one, other)

    def column(self, name: str) -> pa.Array:
        """A column as Arrow array of text, numbers or truth; missing values are null."""
        if name not in self.read:
            named = {str(column): column for column in self.obs.columns}
            if name not in named:
                near = get_close_matches(name, named, n=3)
                did = f"; did you mean {', '.join(map(quoted, near))}?" if near else ""
                raise self.refuse(f"no column {quoted(name)[:SHOWN]}{did}; columns: {_listed(named)}")
            self.read[name] = _array(self.obs[named[name]])
        return self.read[name]

    def scalar(self, node: Compare, column: pa.Array, value: Value) -> pa.Scalar | None:
        """A value in the type of its column; None where the column's type cannot hold it."""
        kind, name = _kind(column.type), quoted(node.column.name)
        shown = f"[{literal(value)}]" if isinstance(node.other, tuple) else literal(value)
        if kind == "text":
            if isinstance(value, str):
                return pa.scalar(value, column.type)
            instead = literal(str(value))
            raise self.refuse(
                f"{name} holds text, write {name} {node.operator} "
                f"{f'[{instead}]' if isinstance(node.other, tuple) else instead}, not {shown}"
            )
        if kind == "true and false":
            if isinstance(value, bool | int) and value in {0, 1}:
                return pa.scalar(bool(value))
            raise self.refuse(f"{name} holds true and false, write {name} == True or {name} == False, not {shown}")
        if isinstance(value, str | bool):
            number = _number(value)
            write = f", write {name} {node.operator} {number:g}" if number is not None else ""
            raise self.refuse(f"{name} holds numbers{write}, not {shown}")
        if pa.types.is_integer(column.type):
            if value != value // 1:  # a fraction equals no whole number
                return None
            value = int(value)
        try:
            return pa.scalar(value, column.type)
        except (pa.ArrowInvalid, OverflowError):
            return None

    def check_values(self, name: str, column: pa.Array, values: Iterable[Value]) -> None:
        """Refuse text that does not occur in its column, and warn of such numbers: a typing error matches no cell or every one."""
        if _kind(column.type) == "true and false":
            return
        present = pc.unique(column.drop_null())
        known = set(present.to_pylist())
        for value in values:
            if pa.types.is_floating(column.type) and not isinstance(value, str):
                there = pa.scalar(float(value), column.type).as_py() in known
            else:
                there = value in known
            if there:
                continue
            if not isinstance(value, str):
                warn(f"{self.field}: no cell has {quoted(name)} == {literal(value)}")
                continue
            near = get_close_matches(value, known, n=3) or sorted(known)[:8]
            msg = (
                f"{self.field}: {quoted(name)} has no value {shortened(value)}; did you mean one of {', '.join(near)}?"
            )
            raise UserError(msg)


def _kind(of: pa.DataType) -> str:
    if pa.types.is_boolean(of):
        return "true and false"
    return "numbers" if pa.types.is_integer(of) or pa.types.is_floating(of) else "text"


def _number(value: Value) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _array(values: pd.Series[Any]) -> pa.Array:
    """A column as Arrow array of text, numbers or truth. Columns of several kinds of values are text."""
    try:
        found = pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        found = None
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks()
    if found is not None and pa.types.is_dictionary(found.type):
        found = found.dictionary_decode()
    if found is not None and pa.types.is_null(found.type):
        return found.cast(pa.string())
    if found is not None and (pa.types.is_string(found.type) or pa.types.is_large_string(found.type)):
        return found
    if found is not None and _kind(found.type) != "text":
        return found
    return pa.array([None if gone else str(v) for v, gone in zip(values, values.isna(), strict=True)], pa.string())
