"""Checked raw counts of a file, in blocks of rows, with the columns of one gene summed.

Input: an open `Reader` and the table of `genes.identify`, which names the gene of each column. Output: int32 CSR blocks.
A value that is no count is a `UserError` that names the file, the cell, the gene and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.cells import kinds
from mixgf.cells.reader import RawBlock, Reader
from mixgf.errors import UserError
from mixgf.jit import jit


@dataclass(frozen=True, slots=True)
class Block:
    """Counts of consecutive rows: int32 CSR over the file's columns. In a row, at most one count above 0 belongs to a gene."""

    start: int
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


_FINITE, _NEGATIVE, _WHOLE, _LARGE = 1, 2, 3, 4
_INVALID = {_FINITE: "not a finite number", _NEGATIVE: "negative", _WHOLE: "not a whole number", _LARGE: "above 2**31"}


@jit
def _to_counts(data: np.ndarray, out: np.ndarray, most: Any) -> bool:
    """Copy `data` to `out` as int32; returns False if any value is not a count.

    `most` is the largest count that the type of `data` can hold. The loop has no branches, so it compiles to vector
    instructions.
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


def _first_invalid(data: np.ndarray) -> tuple[int, int]:
    """Reason code and position of the first value that is not a count."""
    x = data.astype(np.float64)
    tests = {_FINITE: ~np.isfinite(x), _NEGATIVE: x < 0, _WHOLE: x != np.floor(x), _LARGE: x >= 2147483648.0}
    where = {what: int(np.argmax(mask)) for what, mask in tests.items() if mask.any()}
    what = min(where, key=lambda w: (where[w], w))
    return what, where[what]


@jit
def _sum_columns(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, canonical: np.ndarray, total: np.ndarray,
    out: np.ndarray, out_indices: np.ndarray, out_indptr: np.ndarray,
) -> int:  # fmt: skip
    """Sum the columns of one gene in each row, in order of first appearance; returns the number of entries, -1 if too large.

    `canonical` gives the first column of each column's gene. `total` (int64, one per column) is all zeros before and after.
    """
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
def _lower_bound(indices: np.ndarray, lo: int, hi: int, column: int) -> int:
    """First position in [lo, hi) whose column is not below `column`; columns ascend."""
    while lo < hi:
        middle = (lo + hi) >> 1
        if indices[middle] < column:
            lo = middle + 1
        else:
            hi = middle
    return lo


@jit
def _sum_columns_in_place(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, duplicates: np.ndarray, canonical: np.ndarray,
    renamed: np.ndarray,
) -> bool:  # fmt: skip
    """`_sum_columns` in place, for rows with ascending columns and few duplicate columns; returns False if a sum is too large.

    A count that was added to another column stays as 0.

    Args:
        data: counts, changed.
        indices: columns, changed where the gene's first column is not in the row.
        indptr: row pointers.
        duplicates: columns that are not the first of their gene, ascending.
        canonical: first column of the gene of each of `duplicates`.
        renamed: workspace of shape (len(duplicates), 2).
    """
    for row in range(indptr.shape[0] - 1):
        begin, end = indptr[row], indptr[row + 1]
        at, n = begin, 0
        for m in range(duplicates.shape[0]):
            at = _lower_bound(indices, at, end, duplicates[m])
            if at == end:
                break
            if indices[at] != duplicates[m]:
                continue
            first = _lower_bound(indices, begin, at, canonical[m])
            if indices[first] != canonical[m]:
                # the gene's first column is not in this row; an earlier duplicate may have taken its place
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
def _is_ascending(columns: np.ndarray) -> bool:
    good = True
    for p in range(1, columns.shape[0]):
        good &= columns[p] > columns[p - 1]
    return good


@jit
def _column_order(indices: np.ndarray, indptr: np.ndarray, num_columns: int) -> int:
    """2: columns ascend strictly within every row; 1: they do not; 0: a column lies outside the matrix."""
    order = 2
    for row in range(indptr.shape[0] - 1):
        columns = indices[indptr[row] : indptr[row + 1]]
        if columns.shape[0] and not _is_ascending(columns):
            order = 1
            for c in columns:
                if c < 0 or c >= num_columns:
                    return 0
        elif columns.shape[0] and (columns[0] < 0 or columns[-1] >= num_columns):
            return 0
    return order


def read_blocks(reader: Reader, columns: pa.Table, start: int, stop: int, *, rows: int) -> Iterator[Block]:
    """Checked counts of rows [start, stop), in blocks of at most `rows` rows.

    Args:
        reader: an open file.
        columns: the table of `genes.identify` for the file's columns.
        start: first row.
        stop: end of the rows.
        rows: most rows of a block.

    Yields:
        Blocks whose arrays are reused for the next block: copy what must last.

    Raises:
        UserError: a value is negative, fractional, infinite, NaN or above 2**31 - 1, or the file is damaged.
    """
    canonical = columns["canonical"].to_numpy()
    duplicates = np.flatnonzero(canonical != np.arange(len(canonical)))
    first, renamed = canonical[duplicates], np.empty((len(duplicates), 2), np.int64)
    held = np.empty(0, dtype=np.int32)
    for raw in reader.read(start, stop, rows):
        if len(raw.data) > len(held):
            held = np.empty(len(raw.data), dtype=np.int32)
        data = held[: len(raw.data)]
        if not _to_counts(raw.data, data, _largest(raw.data.dtype)) and not (reader.rounded and _round(raw, data)):
            raise _bad_value(reader, columns, raw, *_first_invalid(raw.data))
        order = _column_order(raw.indices, raw.indptr, reader.num_columns)
        if order == 0:
            msg = f"{reader.uri}: a column index outside the matrix near row {raw.start}: the file is damaged; fetch it again"
            raise UserError(msg)
        if order == 2:
            if len(duplicates) and not _sum_columns_in_place(data, raw.indices, raw.indptr, duplicates, first, renamed):
                raise _bad_value(reader, columns, raw, _LARGE, int(np.argmax(data)))
            yield Block(raw.start, data, raw.indices, raw.indptr)
            continue
        out, indices, indptr = np.empty_like(data), np.empty_like(raw.indices), np.zeros_like(raw.indptr)
        total = np.zeros(reader.num_columns, dtype=np.int64)
        n = _sum_columns(data, raw.indices, raw.indptr, canonical, total, out, indices, indptr)
        if n < 0:
            raise _bad_value(reader, columns, raw, _LARGE, int(np.argmax(data)))
        yield Block(raw.start, out[:n], indices[:n], indptr)


def _round(raw: RawBlock, data: np.ndarray) -> bool:
    """Fill `data` with the rounded values; returns False if they are no counts even so."""
    whole = np.rint(raw.data.astype(np.float64))
    if not (np.isfinite(whole).all() and (whole >= 0).all() and (whole < 2147483648.0).all()):
        return False
    if kinds.is_normalised(raw.data, raw.indptr):
        return False
    data[:] = whole
    return True


def _bad_value(reader: Reader, columns: pa.Table, raw: RawBlock, reason: int, at: int) -> UserError:
    row = int(np.searchsorted(raw.indptr, at, side="right")) - 1
    cell = reader.cell_names(raw.start + row, raw.start + row + 1)[0]
    where = f"cell {cell} (row {raw.start + row}), gene {columns['name'][int(raw.indices[at])].as_py()}"
    advice = kinds.advise(reader, raw, row) if reason != _LARGE else "no count is that large: damaged, or not counts"
    msg = f"{reader.uri}: count {raw.data[at]} of {where} is {_INVALID[reason]}; {advice}"
    return UserError(msg)
