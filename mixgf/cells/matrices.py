"""Matrices on disk (HDF5 or Zarr; CSR, CSC or dense) as blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import h5py
import numpy as np

from mixgf.cells import hdf5, zarr_store
from mixgf.cells.frames import Array, Group, is_array
from mixgf.cells.hdf5 import child
from mixgf.cells.reader import SCAN_ENTRIES, RawBlock, Triples, check_entries, cut_rows, file_error, gather_rows

DENSE_BYTES = 64 << 20
"""Most bytes of a dense matrix in memory at a time."""


def shape_of(matrix: Group | Array) -> tuple[int, int]:
    """Rows and columns of a matrix."""
    shape = matrix.shape if is_array(matrix) else matrix.attrs["shape" if "shape" in matrix.attrs else "h5sparse_shape"]
    if len(shape) != 2:
        msg = f"a matrix of {len(shape)} dimensions"
        raise ValueError(msg)
    rows, columns = (int(n) for n in shape)
    return rows, columns


def matrix_reader(
    uri: str, matrix: Group | Array, num_rows: int, num_columns: int
) -> tuple[Callable[[int, int, int], Iterator[RawBlock]], Callable[[], Iterator[Triples]] | None]:
    """Readers of a matrix on disk: of row ranges, and, where it is column-major (CSC), of all entries in order."""
    if is_array(matrix):
        _require_numbers(uri, matrix)
        return lambda a, b, rows: _dense_blocks(matrix, a, b, rows), None
    encoding = str(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "")))
    major = {"csr_matrix": num_rows, "csr": num_rows, "csc_matrix": num_columns, "csc": num_columns}.get(encoding)
    if major is None:
        raise file_error(uri, f"matrix encoding {encoding!r}: must be csr_matrix, csc_matrix or dense")
    check_pointers(uri, matrix, major)
    if encoding.startswith("csr"):
        return lambda a, b, rows: csr_blocks(uri, matrix, a, b, rows, num_columns), None

    def scan() -> Iterator[Triples]:
        return check_entries(uri, _csc_scan(uri, matrix), num_rows, num_columns)

    return lambda a, b, rows: gather_rows(scan(), a, b, rows, num_columns), scan


def check_pointers(uri: str, matrix: Group, major: int) -> None:
    """Check that a sparse matrix has `major` rows (CSR) or columns (CSC), and as many values as its pointers state.

    Raises:
        UserError: it has not, or its values are no numbers.
    """
    indptr, data, indices = (child(matrix, name) for name in ("indptr", "data", "indices"))
    if (
        any(array.ndim != 1 for array in (indptr, data, indices))
        or indptr.dtype.kind not in "iu"
        or indices.dtype.kind not in "iu"
    ):
        raise file_error(
            uri, "its sparse matrix is no three lists of numbers: damaged; read it with anndata and write it again"
        )
    last = int(indptr[indptr.shape[0] - 1]) if indptr.shape[0] else -1
    first = int(indptr[0]) if indptr.shape[0] else -1
    if first or indptr.shape[0] != major + 1 or not last == data.shape[0] == indices.shape[0]:
        raise file_error(uri, "its row pointers do not fit its data: truncated or damaged; fetch it again")
    _require_numbers(uri, data)
    hdf5.require_filters(uri, data, indices)


def _require_numbers(uri: str, array: Array) -> None:
    if array.dtype.kind not in "biuf":
        raise file_error(uri, f"its matrix holds values of type {array.dtype}; give a matrix of counts")
    hdf5.require_filters(uri, array)


def _values_and_indices(matrix: Group) -> tuple[_Ranges, _Ranges]:
    data, indices = matrix["data"], matrix["indices"]
    if isinstance(data, h5py.Dataset):
        return hdf5.RangeReader(data), hdf5.RangeReader(indices)
    return zarr_store.RangeReader(data, stored=True), zarr_store.RangeReader(indices, stored=False)


_Ranges = hdf5.RangeReader | zarr_store.RangeReader


def _check_lost(uri: str, matrix: Group, indices: np.ndarray, lines: int) -> None:
    """Check that 0 stands at most once in each of `lines` rows (CSR) or columns: a lost chunk of a Zarr store reads as 0."""
    if not isinstance(matrix, h5py.Group) and len(indices) - np.count_nonzero(indices) > lines:
        raise file_error(
            uri, f"a chunk of {matrix.name}/indices is not in the store: an incomplete copy; copy it again"
        )


def _native(dtype: np.dtype) -> np.dtype:
    """A type that compiled code reads: the machine's byte order, no half floats."""
    return np.dtype(np.float32) if dtype == np.float16 else np.dtype(dtype).newbyteorder("=")


def _ascending(uri: str, pointers: np.ndarray, num_values: int) -> np.ndarray:
    """Pointers of a sparse matrix as int64, each within its values and none below the one before it."""
    indptr = pointers.astype(np.int64)
    if (np.diff(indptr) < 0).any() or (len(indptr) and not 0 <= indptr[0] <= indptr[-1] <= num_values):
        raise file_error(uri, "its row pointers do not ascend: damaged; fetch it again")
    return indptr


def csr_blocks(uri: str, matrix: Group, start: int, stop: int, rows: int, num_columns: int) -> Iterator[RawBlock]:  # noqa: PLR0917
    """Rows [start, stop) of a CSR group (data, indices, indptr), in blocks of `rows` rows; the arrays are reused."""
    indptr = _ascending(uri, matrix["indptr"][start : stop + 1], matrix["data"].shape[0])
    columns = _values_and_indices(matrix)
    firsts = np.arange(start, stop, rows) - start
    room = int((indptr[np.minimum(firsts + rows, stop - start)] - indptr[firsts]).max(initial=0))
    held = [np.empty(room, _native(column.dtype)) for column in columns]
    remote = [column for column in columns if isinstance(column, hdf5.RangeReader)]
    with hdf5.read_ahead(remote, int(indptr[0]), int(indptr[-1])) if remote else nullcontext():
        for a in range(start, stop, rows):
            p = indptr[a - start : min(a + rows, stop) - start + 1]
            lo, hi = int(p[0]), int(p[-1])
            data, indices = (values[: hi - lo] for values in held)
            for column, out in zip(columns, (data, indices), strict=True):
                column.read(lo, hi, out)
            _check_lost(uri, matrix, indices, len(p) - 1)
            if indices.dtype.itemsize > 4 and len(indices) and not 0 <= indices.min() <= indices.max() < num_columns:
                raise file_error(
                    uri, f"a column index outside the matrix near row {a}: the file is damaged; fetch it again"
                )
            yield RawBlock(a, data, indices.astype(np.int32, copy=False), p - lo)


def _dense_blocks(matrix: Array, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    from scipy import sparse  # noqa: PLC0415 (7 MB that workers with sparse matrices do not need)

    most = max(1, DENSE_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize))  # chunks hold many rows
    for a in range(start, stop, most):
        values = matrix[a : min(a + most, stop)]
        held = sparse.csr_array(values.astype(_native(values.dtype), copy=False))
        yield from cut_rows(held.data, held.indices.astype(np.int32), held.indptr.astype(np.int64), a, rows)


def _csc_scan(uri: str, matrix: Group) -> Iterator[Triples]:
    indptr = _ascending(uri, matrix["indptr"][:], matrix["data"].shape[0])
    columns = _values_and_indices(matrix)
    for lo in range(0, int(indptr[-1]), SCAN_ENTRIES):
        hi = min(lo + SCAN_ENTRIES, int(indptr[-1]))
        data, indices = (np.empty(hi - lo, _native(column.dtype)) for column in columns)
        for column, out in zip(columns, (data, indices), strict=True):
            column.read(lo, hi, out)
        first = int(np.searchsorted(indptr, lo, side="right")) - 1
        last = int(np.searchsorted(indptr, hi, side="left"))
        lengths: np.ndarray = np.diff(np.clip(indptr[first : last + 1], lo, hi))
        _check_lost(uri, matrix, indices, last - first)
        major = np.repeat(np.arange(first, last, dtype=np.int32), lengths)
        yield indices, major, data
