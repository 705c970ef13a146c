"""Sources to bounded row blocks of checked counts, with every column named by its gene.

`resolve` expands what the user listed; `identify` says which gene each column of a file is (spec section 1);
`blocks` yields int32 counts with the columns of one gene summed. Every refusal is one line: file, field, value, way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.cells.reader import RawBlock, Reader
from mixgf.errors import UserError
from mixgf.jit import jit

# Checked counts


@dataclass(frozen=True, slots=True)
class Block:
    """Counts of consecutive rows: int32 CSR over the file's columns; counts above 0 name every gene at most once in a row."""

    start: int
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


_FINITE, _NEGATIVE, _WHOLE, _LARGE = 1, 2, 3, 4
_WRONG = {_FINITE: "not a finite number", _NEGATIVE: "negative", _WHOLE: "not a whole number", _LARGE: "above 2**31"}


@jit
def _to_counts(data: np.ndarray, out: np.ndarray, most: Any) -> bool:
    """Copy as int32; False where a value is no count. Without branches, so that it compiles to vector instructions.

    `most` is the largest count that the type of `data` can hold.
    """
    good = True
    for i in range(data.shape[0]):
        x = data[i]
        fits = (x >= 0) & (x <= most)
        count = np.int32(x if fits else 0)
        out[i] = count
        good &= fits & (data.dtype.type(count) == x)
    return good


def _largest(dtype: np.dtype) -> Any:
    limit = np.iinfo(np.int32).max
    if dtype.kind == "b":
        return dtype.type(1)
    if dtype.kind == "f":
        return np.nextafter(dtype.type(limit + 1), dtype.type(0))
    return dtype.type(min(limit, np.iinfo(dtype).max))


def _first_wrong(data: np.ndarray) -> tuple[int, int]:
    """What is wrong with the first value that is no count, and where it is."""
    x = data.astype(np.float64)
    tests = {_FINITE: ~np.isfinite(x), _NEGATIVE: x < 0, _WHOLE: x != np.floor(x), _LARGE: x >= 2147483648.0}
    where = {what: int(np.argmax(mask)) for what, mask in tests.items() if mask.any()}
    what = min(where, key=lambda w: (where[w], w))
    return what, where[what]


@jit
def _canonical(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, canonical: np.ndarray, total: np.ndarray,
    out: np.ndarray, out_indices: np.ndarray, out_indptr: np.ndarray,
) -> int:  # fmt: skip
    """Sum equal columns of each row, in order of first appearance; `total` is zeros of int64[G] and ends so."""
    n = 0
    for row in range(indptr.shape[0] - 1):
        begin = n
        for p in range(indptr[row], indptr[row + 1]):
            if data[p] == 0:
                continue
            c = canonical[indices[p]]
            if total[c] == 0:
                out_indices[n] = c
                n += 1
            total[c] += data[p]
        for i in range(begin, n):
            c = out_indices[i]
            if total[c] > 2147483647:
                return -1
            out[i] = np.int32(total[c])
            total[c] = 0
        out_indptr[row + 1] = n
    return n


@jit
def _place(indices: np.ndarray, lo: int, hi: int, column: int) -> int:
    """The first place in [lo, hi) of ascending columns that is not before `column`."""
    while lo < hi:
        middle = (lo + hi) >> 1
        if indices[middle] < column:
            lo = middle + 1
        else:
            hi = middle
    return lo


@jit
def _sum_moved(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, moved: np.ndarray, canonical: np.ndarray,
    renamed: np.ndarray,
) -> bool:  # fmt: skip
    """`_canonical` in place, for rows of ascending columns: counts of the few `moved` columns go to their gene's first column.

    What was added elsewhere stays as a count of 0. False where a sum is too large. `moved` ascends; `canonical` is of each
    of them; `renamed` is room for as many places.
    """
    for row in range(indptr.shape[0] - 1):
        begin, end = indptr[row], indptr[row + 1]
        at, n = begin, 0
        for m in range(moved.shape[0]):
            at = _place(indices, at, end, moved[m])
            if at == end:
                break
            if indices[at] != moved[m]:
                continue
            first = _place(indices, begin, at, canonical[m])
            if (
                indices[first] != canonical[m]
            ):  # the gene's first column is not in this row: an earlier one may stand for it
                first = at
                for k in range(n):
                    if canonical[renamed[k, 1]] == canonical[m]:
                        first = renamed[k, 0]
                if first == at:
                    renamed[n] = at, m
                    n += 1
                    continue
            total = np.int64(data[first]) + data[at]
            if total > 2147483647:
                return False
            data[first], data[at] = total, 0
        for k in range(n):
            indices[renamed[k, 0]] = canonical[renamed[k, 1]]
    return True


@jit
def _ascend(columns: np.ndarray) -> bool:
    good = True
    for p in range(1, columns.shape[0]):
        good &= columns[p] > columns[p - 1]
    return good


@jit
def _is_sorted(indices: np.ndarray, indptr: np.ndarray, num_columns: int) -> int:
    """2: strictly ascending columns within rows; 1: not; 0: a column outside the matrix."""
    order = 2
    for row in range(indptr.shape[0] - 1):
        columns = indices[indptr[row] : indptr[row + 1]]
        if columns.shape[0] and not _ascend(columns):
            order = 1
            for c in columns:
                if c < 0 or c >= num_columns:
                    return 0
        elif columns.shape[0] and (columns[0] < 0 or columns[-1] >= num_columns):
            return 0
    return order


def blocks(reader: Reader, columns: pa.Table, start: int, stop: int, *, rows: int) -> Iterator[Block]:
    """Checked counts of rows [start, stop) in blocks of at most `rows` rows; wrong values are a `UserError`.

    A block's arrays are used again for the next one: copy what you keep.
    """
    canonical = columns["canonical"].to_numpy()
    moved = np.flatnonzero(canonical != np.arange(len(canonical)))
    first, renamed = canonical[moved], np.empty((len(moved), 2), np.int64)
    held = np.empty(0, dtype=np.int32)
    for raw in reader.read(start, stop, rows):
        if len(raw.data) > len(held):
            held = np.empty(len(raw.data), dtype=np.int32)
        data = held[: len(raw.data)]
        if not _to_counts(raw.data, data, _largest(raw.data.dtype)):
            raise _bad_value(reader, columns, raw, *_first_wrong(raw.data))
        order = _is_sorted(raw.indices, raw.indptr, reader.num_columns)
        if order == 0:
            msg = f"{reader.uri}: a column index outside the matrix near row {raw.start}: the file is damaged; fetch it again"
            raise UserError(msg)
        if order == 2:
            if len(moved) and not _sum_moved(data, raw.indices, raw.indptr, moved, first, renamed):
                raise _bad_value(reader, columns, raw, _LARGE, int(np.argmax(data)))
            yield Block(raw.start, data, raw.indices, raw.indptr)
            continue
        out, indices, indptr = np.empty_like(data), np.empty_like(raw.indices), np.zeros_like(raw.indptr)
        total = np.zeros(reader.num_columns, dtype=np.int64)
        n = _canonical(data, raw.indices, raw.indptr, canonical, total, out, indices, indptr)
        if n < 0:
            raise _bad_value(reader, columns, raw, _LARGE, int(np.argmax(data)))
        yield Block(raw.start, out[:n], indices[:n], indptr)


def _bad_value(reader: Reader, columns: pa.Table, raw: RawBlock, wrong: int, at: int) -> UserError:
    row = int(np.searchsorted(raw.indptr, at, side="right")) - 1
    cell = reader.cell_names(raw.start + row, raw.start + row + 1)[0]
    where = f"cell {cell} (row {raw.start + row}), gene {columns['name'][int(raw.indices[at])].as_py()}"
    msg = f"{reader.uri}: count {raw.data[at]} of {where} is {_WRONG[wrong]}; {_advice(raw, wrong)}"
    return UserError(msg)


def _advice(raw: RawBlock, wrong: int) -> str:
    with np.errstate(all="ignore"):
        for name, values in (("normalised", raw.data), ("log-normalised", np.expm1(raw.data.astype(np.float64)))):
            rows = np.repeat(np.arange(len(raw.indptr) - 1), np.diff(raw.indptr))
            sums = np.bincount(rows, weights=values, minlength=len(raw.indptr) - 1)
            sums = sums[sums > 0]
            if wrong == _WHOLE and len(sums) and np.ptp(sums) < 1e-3 * sums.mean():
                return f"the matrix is already {name} (every cell sums to {sums.mean():,.0f}): give raw counts (sources[i].layer)"
    if wrong == _NEGATIVE:
        return "the matrix looks scaled: give raw counts (sources[i].layer = 'raw' or a layer's name)"
    return "counts must be whole numbers from 0: give raw counts (sources[i].layer = 'raw' or a layer's name)"
