"""Moved here from mixgf/formats.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from mixgf.errors import UserError

SCAN_ENTRIES = 4_000_000
"""Counts held at a time while a column-major file is scanned."""


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Counts of consecutive rows as CSR; values as stored in the file."""

    start: int
    """Row in the file of the first row."""
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


Triples = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Row, column and value of some entries."""


@dataclass(kw_only=True)
class Reader:
    """One open file. `num_rows` cells x `num_columns` features."""

    uri: str
    num_rows: int
    num_columns: int
    gene_names: Callable[[str], np.ndarray]
    """Names (ids or symbols) of the columns, by `Source.genes`."""
    read: Callable[[int, int, int], Iterator[RawBlock]]
    """Blocks of rows [start, stop), each of at most so many rows. The arrays of one may be used again for the next."""
    cell_names: Callable[[int, int], np.ndarray]
    obs_columns: list[str] = field(default_factory=list)
    obs: Callable[[str, int, int], np.ndarray] = lambda *_: np.empty(0)
    """Values of one obs column: float64, int64, or objects that are str or None."""
    is_gene: np.ndarray | None = None
    """Which columns are genes, where the file holds other features too; the others are not read."""
    scan: Callable[[], Iterator[Triples]] | None = None
    """Of column-major files: all entries, in the file's order. Reading a row range of one is a scan of the whole file."""


def _refuse(uri: str, what: str) -> UserError:
    return UserError(f"{uri}: {what}")


def _gather(scan: Iterator[Triples], start: int, stop: int, rows: int, num_columns: int) -> Iterator[RawBlock]:
    """Rows [start, stop) of a scan, as blocks."""
    kept: list[Triples] = []
    for row, column, value in scan:
        mask = (row >= start) & (row < stop)
        if mask.any():
            kept.append(((row[mask] - start).astype(np.int32), column[mask].astype(np.int32), value[mask]))
    if kept:
        r, c, v = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    else:
        r, c, v = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32)
    del kept
    data, indices, indptr = by_row(r, c, v, stop - start)
    yield from cut_rows(data, indices, indptr, start, rows)


def by_row(
    row: np.ndarray, column: np.ndarray, value: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries as CSR (data, int32 indices, int64 indptr): rows in order, and the entries of a row in the order given."""
    small = row.astype(np.uint16) if num_rows < 1 << 16 else row  # numpy sorts 16 bits by radix
    order = np.argsort(small, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))]).astype(np.int64)
    return value[order], column[order], indptr


def cut_rows(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, start: int, rows: int) -> Iterator[RawBlock]:
    """A CSR matrix whose first row is row `start` of a file, in blocks of so many rows."""
    for a in range(0, len(indptr) - 1, rows):
        p = indptr[a : a + rows + 1]
        yield RawBlock(start + a, data[p[0] : p[-1]], indices[p[0] : p[-1]], p - p[0])
