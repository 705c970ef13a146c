"""Reader of AnnData files (.h5ad): CSR, CSC or dense counts in X, raw or a layer, in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import h5py
import numpy as np
from scipy import sparse

from mixgf.cells.hdf5 import RangeReader, column_length, csr_blocks, read_column, read_strings
from mixgf.cells.reader import SCAN_ENTRIES, RawBlock, Reader, Triples, cut_rows, file_error, gather_rows

DENSE_BYTES = 64 << 20
"""Most bytes of a dense matrix in memory at a time."""


def open_h5ad(uri: str, file: h5py.File, layer: str) -> Reader:
    """Reader of an open .h5ad file; `layer` is `X`, `raw` (raw/X) or the name of a layer.

    Raises:
        UserError: no such layer, a matrix encoding that is not supported, or a damaged file.
    """
    where = {"X": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    if where not in file:
        have = [*(k for k in ("X",) if k in file), *(["raw"] if "raw/X" in file else []), *file.get("layers", {})]
        raise file_error(uri, f"layer = {layer!r}: not in the file; it has {', '.join(have) or 'no counts'}")
    var = file["raw/var" if layer == "raw" else "var"]
    obs = file["obs"]
    if isinstance(obs, h5py.Dataset) or isinstance(var, h5py.Dataset):
        raise file_error(uri, "written by anndata before 0.7; read it with anndata and write it again")
    matrix = file[where]
    num_rows, num_columns = (int(n) for n in _shape(matrix))
    index = _index(obs)
    if (length := column_length(index)) != num_rows:
        raise file_error(uri, f"obs has {length} rows, {where} has {num_rows}; the file is damaged")
    read, scan = matrix_reader(uri, matrix, num_rows, num_columns)
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: _gene_names(uri, var, column),
        read=read,
        scan=scan,
        cell_names=lambda a, b: read_strings(index, a, b),
        obs_columns=[str(name) for name in obs.attrs.get("column-order", [])],
        obs=lambda name, a, b: read_column(obs[name], a, b),
    )


def _shape(matrix: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    if isinstance(matrix, h5py.Dataset):
        return cast("tuple[int, int]", matrix.shape)
    return cast(
        "tuple[int, int]", tuple(matrix.attrs["shape"] if "shape" in matrix.attrs else matrix.attrs["h5sparse_shape"])
    )


def _index(frame: h5py.Group) -> h5py.Group | h5py.Dataset:
    """Index of a data frame: strings, categories with codes, or strings with a mask (anndata 0.13 with pandas 3)."""
    return frame[frame.attrs.get("_index", "_index")]


def _gene_names(uri: str, var: h5py.Group, column: str) -> np.ndarray:
    index = _index(var)
    length = column_length(index)
    named = (name for name in map(str, var) if not name.startswith("_"))  # the index may have a name, too
    columns = list(dict.fromkeys([*map(str, var.attrs.get("column-order", [])), *named]))
    return choose_gene_names(
        uri, read_strings(index, 0, length), columns, lambda n: read_column(var[n], 0, length), column
    )


def choose_gene_names(
    uri: str, symbols: np.ndarray, columns: Sequence[str], read: Callable[[str], np.ndarray], column: str
) -> np.ndarray:
    """Names (ids or symbols) of the genes of a `var` table; where the chosen column is empty, the index stands in.

    Args:
        uri: Of the file, for messages.
        symbols: The index of var.
        columns: Names of its columns.
        read: Gives the values of one column.
        column: The one to read; empty = `ensembl_id` or `gene_ids` where there is such a column, else the index.
    """
    names = column or next((n for n in ("ensembl_id", "gene_ids") if n in columns), "")
    if not names:
        return symbols
    if names not in columns:
        have = ", ".join(columns) or "none"
        raise file_error(uri, f"genes = {names!r}: no such column of var; it has {have} (empty = the index)")
    ids = read(names)
    return np.asarray([i if isinstance(i, str) and i else s for i, s in zip(ids, symbols, strict=True)], dtype=object)


# matrices


def matrix_reader(
    uri: str, matrix: h5py.Group | h5py.Dataset, num_rows: int, num_columns: int
) -> tuple[Callable[[int, int, int], Iterator[RawBlock]], Callable[[], Iterator[Triples]] | None]:
    """Readers of a matrix on disk: of row ranges, and, where it is column-major (CSC), of all entries in order."""
    if isinstance(matrix, h5py.Dataset):
        return lambda a, b, rows: _dense_blocks(matrix, a, b, rows), None
    encoding = str(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "")))
    major = {"csr_matrix": num_rows, "csr": num_rows, "csc_matrix": num_columns, "csc": num_columns}.get(encoding)
    if major is None:
        raise file_error(uri, f"matrix encoding {encoding!r}: must be csr_matrix, csc_matrix or dense")
    indptr = matrix["indptr"]
    if indptr.shape[0] != major + 1 or int(indptr[-1]) != matrix["data"].shape[0]:
        raise file_error(uri, "its row pointers do not fit its data: truncated or damaged; fetch it again")
    if encoding.startswith("csr"):
        return lambda a, b, rows: csr_blocks(matrix, a, b, rows), None

    def scan() -> Iterator[Triples]:
        return _csc_scan(matrix)

    return lambda a, b, rows: gather_rows(scan(), a, b, rows, num_columns), scan


def _dense_blocks(matrix: h5py.Dataset, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    most = max(1, DENSE_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize))  # chunks hold many rows
    for a in range(start, stop, most):
        held = sparse.csr_array(matrix[a : min(a + most, stop)])
        yield from cut_rows(held.data, held.indices.astype(np.int32), held.indptr.astype(np.int64), a, rows)


def _csc_scan(matrix: h5py.Group) -> Iterator[Triples]:
    indptr = matrix["indptr"][:].astype(np.int64)
    columns = RangeReader(matrix["data"]), RangeReader(matrix["indices"])
    for lo in range(0, int(indptr[-1]), SCAN_ENTRIES):
        hi = min(lo + SCAN_ENTRIES, int(indptr[-1]))
        data, indices = (np.empty(hi - lo, column.dtype) for column in columns)
        for column, out in zip(columns, (data, indices), strict=True):
            column.read(lo, hi, out)
        first = int(np.searchsorted(indptr, lo, side="right")) - 1
        last = int(np.searchsorted(indptr, hi, side="left"))
        lengths = np.diff(np.clip(indptr[first : last + 1], lo, hi))
        major = np.repeat(np.arange(first, last, dtype=np.int32), lengths)
        yield indices.astype(np.int32, copy=False), major, data
