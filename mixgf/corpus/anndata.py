"""AnnData objects read as files are: bounded blocks of raw counts, names of genes and cells, `obs` values.

`open_cells` gives the same `Reader` for an AnnData in memory, one that is backed by a file, a view of either, and a path
or URI. Everything after it (`mixgf.cells.counts`, `mixgf.corpus.in_memory`) does not know the difference.

Memory: one block of rows. A column-major matrix (CSC) is the exception: in memory it is turned into rows once; in a file
it is scanned from end to end for every range of rows, as `mixgf.cells.open` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from mixgf.cells.features import choose_gene_names, find_kinds, gene_columns, kinds_by_name
from mixgf.cells.matrices import DENSE_BYTES, matrix_reader
from mixgf.cells.open import open_reader
from mixgf.cells.reader import RawBlock, Reader, Triples
from mixgf.errors import UserError

if TYPE_CHECKING:
    from anndata import AnnData

NAME = "adata"
"""What an AnnData object is called in messages."""
OPTION = "{field}={value!r}"
"""How an argument of the Python API is written, for messages."""

ReadRows = Callable[[int, int, int], Iterator[RawBlock]]


def is_anndata(data: object) -> bool:
    """Whether an object is an AnnData, without importing anndata."""
    return any(f"{base.__module__}.{base.__name__}".startswith("anndata.") for base in type(data).__mro__)


@contextmanager
def open_cells(data: AnnData | str | os.PathLike[str], layer: str = "X") -> Iterator[Reader]:
    """Open an AnnData, or a file of counts by its path or URI.

    Args:
        data: AnnData (in memory, backed, or a view), or the path or URI of an `.h5ad`, 10x `.h5` or 10x folder.
        layer: `X`, `raw` (that is, raw.X), or the name of a layer.

    Raises:
        UserError: no such layer, no such file, or something that is neither.
    """
    if is_anndata(data):
        yield _reader(data, layer)
    elif isinstance(data, str | os.PathLike):
        with open_reader(os.fspath(data), layer, option=OPTION) as reader:
            yield reader
    else:
        msg = f"{NAME} is {type(data).__name__}: must be an AnnData, or the path or URI of an .h5ad, .zarr, 10x .h5 or 10x folder"
        raise UserError(msg)


def _reader(adata: Any, layer: str) -> Reader:
    var = adata.raw.var if layer == "raw" and adata.raw is not None else adata.var
    frame = var if var.index.name is None else var.assign(**{str(var.index.name): var.index})
    read, scan = _rows(adata, layer)
    is_gene, kinds = find_kinds(NAME, list(map(str, var.columns)), lambda name: values(var[name]))
    if kinds is None and layer == "raw":
        is_gene, kinds = kinds_by_name(
            NAME, list(map(str, adata.var.columns)), lambda name: values(adata.var[name]),
            index=_text(adata.var.index), names=_text(var.index),
        )  # fmt: skip
    columns = list(map(str, frame.columns))
    return Reader(
        uri=NAME,
        option=OPTION,
        num_rows=adata.n_obs,
        num_columns=len(var),
        gene_names=lambda column: choose_gene_names(
            NAME, _text(var.index), columns, lambda name: values(frame[name]), column
        ),
        gene_columns=gene_columns(columns),
        read=read,
        scan=scan,
        cell_names=lambda start, stop: _text(adata.obs_names[start:stop]),
        obs_columns=list(map(str, adata.obs.columns)),
        obs=lambda name, start, stop: values(adata.obs[name].iloc[start:stop]),
        is_gene=is_gene,
        kinds=kinds,
        layer=layer,
        others=lambda: {name: _reader(adata, name) for name in _layers(adata) if name != layer},
    )


def _layers(adata: Any) -> list[str]:
    """Names of the matrices: `X`, `raw`, and the layers."""
    named = [name for name in adata.layers if name is not None]  # from anndata 0.13 on None is the name of X
    return [*(["X"] if adata.X is not None else []), *(["raw"] if adata.raw is not None else []), *named]


def _text(index: pd.Index) -> np.ndarray:
    return np.asarray([str(name) for name in index], dtype=object)


def values(column: pd.Series) -> np.ndarray:
    """One column of a data frame as a file gives it: float64, int64, or objects that are str or None."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        named = values(pd.Series(column.cat.categories))
        codes = column.cat.codes.to_numpy()
        if (codes < 0).any():
            missing = np.asarray([None], object) if named.dtype == object else np.asarray([np.nan])
            named = np.concatenate([named, missing])
        return np.asarray(named[codes])  # -1 takes the appended missing value
    if pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_numeric_dtype(column.dtype):
        whole = not pd.api.types.is_float_dtype(column.dtype) and not column.isna().any()
        return column.to_numpy(np.int64) if whole else column.to_numpy(np.float64, na_value=np.nan)
    return np.asarray([None if gone else str(value) for value, gone in zip(column, column.isna(), strict=True)], object)


def _rows(adata: Any, layer: str) -> tuple[ReadRows, Callable[[], Iterator[Triples]] | None]:
    """Readers of the counts: rows of a view are taken from what it is a view of, block by block."""
    matrix = _matrix(adata._adata_ref if adata.is_view else adata, layer)
    if adata.is_view:
        parent, rows_N, columns = adata._adata_ref, np.arange(adata._adata_ref.n_obs)[adata._oidx], adata._vidx

        def block(start: int, stop: int) -> Any:
            return _matrix(parent[rows_N[start:stop], columns], layer)

        row_bytes = adata.n_vars * 8
        return lambda start, stop, rows: _blocks(block, row_bytes, start, stop, rows), None
    node = matrix if isinstance(matrix, h5py.Dataset) else getattr(matrix, "group", None)
    if node is not None:
        return matrix_reader(NAME, node, *matrix.shape)
    held = matrix.tocsr() if sparse.issparse(matrix) else matrix
    row_bytes = 0 if sparse.issparse(held) else held.shape[1] * held.dtype.itemsize
    return lambda start, stop, rows: _blocks(lambda a, b: held[a:b], row_bytes, start, stop, rows), None


def _matrix(adata: Any, layer: str) -> Any:
    """The matrix of a layer: numpy or scipy in memory; an HDF5 dataset or anndata's sparse dataset where it is backed."""
    if layer == "raw":
        found = None if adata.raw is None else adata.raw.X
    else:
        found = adata.X if layer == "X" else adata.layers.get(layer)
    if found is None:
        msg = f"{NAME}: layer = {layer!r}: not there; it has {', '.join(_layers(adata)) or 'no counts'}"
        raise UserError(msg)
    usable = isinstance(found, np.ndarray | h5py.Dataset) or sparse.issparse(found) or hasattr(found, "group")
    if not usable:
        msg = f"{NAME}: layer = {layer!r} is {type(found).__name__}: must be a numpy array or a scipy sparse matrix"
        raise UserError(msg)
    return found


def _blocks(block: Callable[[int, int], Any], row_bytes: int, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    """Rows [start, stop) as CSR blocks whose arrays are copies: `counts.read_blocks` writes into them."""
    most = min(rows, max(1, DENSE_BYTES // row_bytes)) if row_bytes else rows
    for a in range(start, stop, most):
        part = sparse.csr_array(block(a, min(a + most, stop)))
        yield RawBlock(a, part.data, np.array(part.indices, np.int32), part.indptr.astype(np.int64))
