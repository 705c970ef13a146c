"""Columns of AnnData's data frames (obs, var) in HDF5 or Zarr, by ranges of rows.

A column is an array of numbers or strings, a categorical (codes and categories; in anndata 0.7 an array of codes with a
reference to its categories), or a nullable array (values and mask). Before anndata 0.7 the frame is one array of records
(`Records`), whose categories are in `uns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import h5py
import numpy as np

from mixgf.cells.hdf5 import child
from mixgf.cells.zarr_store import ZarrArray

Group: TypeAlias = Any
"""`h5py.Group` (h5py has no types) or `ZarrGroup`."""
Array: TypeAlias = Any
"""`h5py.Dataset`, `ZarrArray` or `RecordField`."""


class RecordField:
    """One field of an array of records, as a column."""

    def __init__(self, records: h5py.Dataset, name: str, categories: Array | None) -> None:
        self._records, self._name, self.categories = records, name, categories
        self.shape, self.ndim = records.shape, records.ndim
        self.attrs: dict[str, Any] = {}
        self.dtype = records.dtype[name]

    def __getitem__(self, key: Any) -> np.ndarray:
        return np.asarray(self._records[key][self._name])


class Records:
    """A data frame of anndata before 0.7: an array of records, of which the first field is the index."""

    def __init__(self, records: h5py.Dataset, uns: Group | None) -> None:
        self._records, self._uns = records, uns
        self._names = list(records.dtype.names or ())
        self.attrs = {"_index": self._names[0] if self._names else "index", "column-order": self._names[1:]}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> RecordField:
        known = f"{name}_categories"
        categories = child(self._uns, known) if self._uns is not None and known in self._uns else None
        return RecordField(self._records, name, categories)


def open_frame(root: Group, name: str) -> Group | Records:
    """A data frame of a file.

    Raises:
        ValueError: an array that is no data frame.
    """
    frame = child(root, name)
    if not is_array(frame):
        return frame
    if not getattr(frame.dtype, "names", None):
        msg = f"{name} is an array of {frame.dtype}, not a data frame"
        raise ValueError(msg)
    return Records(frame, child(root, "uns") if "uns" in root else None)


def column(frame: Group | Records, name: str) -> Group | Array:
    """A column of a data frame."""
    return frame[name] if isinstance(frame, Records) else child(frame, name)


def is_array(node: Group | Array) -> bool:
    """Whether a node is an array, not a group."""
    return isinstance(node, h5py.Dataset | ZarrArray | RecordField)


def index_of(frame: Group) -> Group | Array:
    """Index of a data frame: strings, categories with codes, or strings with a mask (anndata 0.13 with pandas 3)."""
    named = _text(frame.attrs.get("_index", "_index"))
    return column(
        frame, named if named in frame else next(n for n in ("_index", "index", named) if n in frame or n == named)
    )


def columns_of(frame: Group) -> list[str]:
    """Names of the columns of a data frame, in their order, without the index."""
    if "column-order" not in frame.attrs:  # written by another program
        index = {_text(frame.attrs.get("_index", "_index")), "_index", "index", "__categories"}
        return [name for name in map(str, frame) if name not in index]
    named = [_text(name) for name in frame.attrs["column-order"]]
    return [name for name in named if name in frame]  # some tools remove a column and leave its name


def column_length(node: Group | Array) -> int:
    """Rows of a column."""
    if not is_array(node):
        node = child(node, "codes" if "codes" in node else "values")
    return int(node.shape[0]) if node.ndim else 1


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
        if isinstance(node, RecordField):
            return values if node.categories is None else _of_codes(node.categories, values)
        if "categories" in node.attrs:
            return _of_codes(node.parent[node.attrs["categories"]], values)
        store = f"__categories/{node.name.rpartition('/')[2]}"  # written without the reference
        return (
            _of_codes(child(node.parent, store), values)
            if isinstance(node, h5py.Dataset) and store in node.parent
            else values
        )
    if "codes" in node:
        return _of_codes(child(node, "categories"), _read_array(child(node, "codes"), start, stop))
    if "values" not in node or "mask" not in node:
        msg = f"encoding {node.attrs.get('encoding-type', 'unknown')!r} is not read"
        raise ValueError(msg)
    values = read_column(child(node, "values"), start, stop)  # nullable integer, boolean or string
    mask = np.asarray(child(node, "mask")[start:stop]).astype(bool)
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
    if array.ndim == 0 and isinstance(array, h5py.Dataset):  # the only category, in files of 2018
        value = array.asstr()[()] if h5py.check_string_dtype(array.dtype) is not None else array[()]
        return np.asarray([value], dtype=object if isinstance(value, str | bytes) else None)[start:stop]
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
    if values.dtype == np.uint64 and len(values) and values.max() > np.iinfo(np.int64).max:
        msg = f"{values.max()} is above 2**63 - 1, the largest whole number that a column can hold; write it as text"
        raise ValueError(msg)
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return None if value is None else str(value)
