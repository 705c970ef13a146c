"""What every count file offers (`Reader`), and CSR blocks of rows made from entries in any order."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from mixgf.errors import UserError

OPTION = "--set sources.{field}={value}"
"""How the user of `mixgf prepare` gives a field of a source."""
FILE_OPTION = "--{field} {value}"
"""How the user of a command that reads one file (annotate, embed, audit) gives a field of it."""
SCAN_ENTRIES = 4_000_000
"""Entries in memory at a time while a column-major file is scanned."""


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Counts of consecutive rows as CSR, with the values and types of the file; not checked."""

    start: int
    """Row of the file that is the block's first row."""
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


Triples = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Row, column and value of entries, three arrays of one length."""


@dataclass(kw_only=True)
class Reader:
    """One open count file: `num_rows` cells x `num_columns` features."""

    uri: str
    num_rows: int
    num_columns: int
    gene_names: Callable[[str], np.ndarray]
    """Names (ids or symbols) of the columns, from the column of var that the argument (`Source.genes`) names; empty = the first
    of `gene_columns`."""
    read: Callable[[int, int, int], Iterator[RawBlock]]
    """(start, stop, rows): rows [start, stop) in blocks of at most `rows` rows. Arrays may be reused for the next block."""
    cell_names: Callable[[int, int], np.ndarray]
    """Names (barcodes) of rows [start, stop)."""
    obs_columns: list[str] = field(default_factory=list)
    obs: Callable[[str, int, int], np.ndarray] = lambda *_: np.empty(0)
    """(column, start, stop): values of an obs column: float64, int64, or objects (str or None)."""
    is_gene: np.ndarray | None = None
    """bool, one per column: which are genes, in files that hold other features (antibodies) too; None = all."""
    kinds: np.ndarray | None = None
    """Where `is_gene` is given: the kind of each feature, as the file calls it."""
    gene_columns: list[str] = field(default_factory=list)
    """Columns of var that may hold names, `index` included; the first one is read where none is asked for."""
    others: Callable[[], dict[str, Reader]] = dict
    """The other matrices of the file by the name of their layer."""
    layer: str = "X"
    """Of AnnData: the layer that is read."""
    rounded: bool = False
    """Round values to whole numbers (`Source.round`)."""
    value_type: np.dtype | None = None
    """Type of the values in the file, where it is known."""
    scan: Callable[[], Iterator[Triples]] | None = None
    """Column-major files only: all entries, in the order of the file. There, `read` scans the whole file."""
    format: str = ""
    """`h5ad`, `zarr`, `annbatch`, `soma`, `10x_h5`, `mtx`; empty for AnnData in memory."""
    option: str = OPTION
    """How the user gives a field of a source, such as `layer`, to the command or function that reads; for messages."""

    def setting(self, field: str, value: str) -> str:
        """What the user writes to set a field of the source."""
        return setting(self.option, field, value)


def setting(option: str, field: str, value: str) -> str:
    """What the user writes to set a field of the source, where `option` is how (`Reader.option`)."""
    return option.format(field=field, value=value if "!r" in option else shlex.quote(value))


def file_error(uri: str, what: str) -> UserError:
    """The error to raise for a file that cannot be used."""
    return UserError(f"{uri}: {what}")


def check_entries(uri: str, entries: Iterable[Triples], num_rows: int, num_columns: int) -> Iterator[Triples]:
    """The entries, each within the matrix.

    Raises:
        UserError: an entry lies outside; the message names it.
    """
    for row, column, value in entries:
        for what, at, num in (("cell", row, num_rows), ("gene", column, num_columns)):
            if len(at) and not 0 <= at.min() <= at.max() < num:
                wrong = int(at[np.argmax((at < 0) | (at >= num))])
                raise file_error(
                    uri, f"an entry of {what} {wrong + 1:,} (of {num:,}): damaged, or the files do not belong together"
                )
        yield row, column, value


def gather_rows(scan: Iterator[Triples], start: int, stop: int, rows: int, num_columns: int) -> Iterator[RawBlock]:
    """Rows [start, stop) of a column-major file, in blocks; all of them are in memory at once."""
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
    """CSR (data, int32 indices, int64 indptr) of entries in any order; within a row they keep their order."""
    small = row.astype(np.uint16) if num_rows < 1 << 16 else row  # numpy sorts 16 bits by radix
    order = np.argsort(small, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))]).astype(np.int64)
    return value[order], column[order], indptr


def cut_rows(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, start: int, rows: int) -> Iterator[RawBlock]:
    """Blocks of `rows` rows of a CSR matrix whose first row is row `start` of the file."""
    for a in range(0, len(indptr) - 1, rows):
        p = indptr[a : a + rows + 1]
        yield RawBlock(start + a, data[p[0] : p[-1]], indices[p[0] : p[-1]], p - p[0])
