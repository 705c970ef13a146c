"""Columns of AnnData's data frames (obs, var) in HDF5 or Zarr, by ranges of rows.

A column is an array of numbers or strings, a categorical (codes and categories; in anndata 0.7 an array of codes with a
reference to its categories), or a nullable array (values and mask).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import h5py
import numpy as np

from mixgf.cells.zarr_store import ZarrArray

Group: TypeAlias = Any
"""`h5py.Group` (h5py has no types) or `ZarrGroup`."""
Array: TypeAlias = Any
"""`h5py.Dataset` or `ZarrArray`."""


def is_array(node: Group | Array) -> bool:
    """Whether a node is an array, not a group."""
    return isinstance(node, h5py.Dataset | ZarrArray)


def index_of(frame: Group) -> Group | Array:
    """Index of a data frame: strings, categories with codes, or strings with a mask (anndata 0.13 with pandas 3)."""
    return frame[_text(frame.attrs.get("_index", "_index"))]


def columns_of(frame: Group) -> list[str]:
    """Names of the columns of a data frame, in their order, without the index."""
    named = [_text(name) for name in frame.attrs.get("column-order", [])]
    return [name for name in named if name in frame]  # some tools remove a column and leave its name


def column_length(node: Group | Array) -> int:
    """Rows of a column."""
    if not is_array(node):
        node = node["codes" if "codes" in node else "values"]
    return int(node.shape[0])


def read_strings(column: Group | Array, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a column as an object array of str."""
    values = read_column(column, start, stop)
    return np.asarray([str(v) for v in values], dtype=object)


def read_column(node: Group | Array, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a column: float64 (NaN = missing), int64, or objects (str or None).

    Raises:
        ValueError: the column is of another encoding.
    """
    if is_array(node):
        values = _read_array(node, start, stop)
        return _of_codes(node.parent[node.attrs["categories"]], values) if "categories" in node.attrs else values
    if "codes" in node:
        return _of_codes(node["categories"], _read_array(node["codes"], start, stop))
    if "values" not in node or "mask" not in node:
        msg = f"encoding {node.attrs.get('encoding-type', 'unknown')!r} is not read"
        raise ValueError(msg)
    values = read_column(node["values"], start, stop)  # nullable integer, boolean or string
    mask = np.asarray(node["mask"][start:stop]).astype(bool)
    if not mask.any():
        return values
    values = values.astype(object if values.dtype == object else np.float64)
    values[mask] = None if values.dtype == object else np.nan
    return values


def _of_codes(categories: Group | Array, codes: np.ndarray) -> np.ndarray:
    values = read_column(categories, 0, column_length(categories))
    if len(codes) and not -1 <= codes.min() <= codes.max() < len(values):
        msg = f"a code of a category is {codes.min()} or {codes.max()}, and there are {len(values)} categories"
        raise ValueError(msg)
    missing = np.asarray(
        [None if values.dtype == object else np.nan], dtype=object if values.dtype == object else float
    )
    if (codes < 0).any():
        values = np.concatenate([values, missing])
    return values[codes.astype(np.int64)]  # -1 takes the appended missing value


def _read_array(array: Array, start: int, stop: int) -> np.ndarray:
    if array.ndim != 1:
        msg = f"an array of {array.ndim} dimensions is no column"
        raise ValueError(msg)
    if isinstance(array, h5py.Dataset) and h5py.check_string_dtype(array.dtype) is not None:
        return np.asarray(array.asstr()[start:stop], dtype=object)
    values = np.asarray(array[start:stop])
    if values.dtype.kind in "OTUS":
        return np.asarray([_text(v) for v in values], dtype=object)
    if values.dtype.kind not in "biuf":
        msg = f"values of type {values.dtype} are not read"
        raise ValueError(msg)
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return None if value is None else str(value)
