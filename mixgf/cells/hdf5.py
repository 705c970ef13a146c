"""HDF5 on local disk or object storage: columns of data frames, and blocks of CSR rows, read past HDF5 where possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import deflate
import h5py
import numpy as np

from mixgf.cells.reader import RawBlock
from mixgf.storage import files

_CHUNK_CACHE = 32 << 20


@contextmanager
def open_hdf5(uri: str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; a file on object storage is read in ranges, not downloaded."""
    options: dict[str, Any] = {"rdcc_nbytes": _CHUNK_CACHE}
    if files.is_local(uri):
        with files.local_copy(uri) as path, h5py.File(path, "r", **options) as file:
            yield file
        return
    with files.open_read(uri) as stream, h5py.File(stream, "r", **options) as file:
        yield file


def column_length(node: h5py.Group | h5py.Dataset) -> int:
    """Rows of a column of a data frame: an array, a categorical (codes), or a nullable array (values and mask)."""
    if isinstance(node, h5py.Group):
        node = node["codes" if "codes" in node else "values"]
    return int(node.shape[0])


def read_strings(column: h5py.Group | h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a column as an object array of str."""
    if isinstance(column, h5py.Group):
        values = read_column(column, start, stop)
    elif h5py.check_string_dtype(column.dtype) is not None:
        return np.asarray(column.asstr()[start:stop], dtype=object)
    else:
        values = column[start:stop]
    return np.asarray([str(v) for v in values], dtype=object)


def read_column(node: h5py.Group | h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a column of a data frame: float64 (NaN = missing), int64, or objects (str or None)."""
    if isinstance(node, h5py.Dataset):
        if h5py.check_string_dtype(node.dtype) is not None:
            return read_strings(node, start, stop)
        return _widen(node[start:stop])
    if "codes" in node:
        codes = node["codes"][start:stop].astype(np.int64)
        values = read_column(node["categories"], 0, column_length(node["categories"]))
        last = np.asarray(
            [None if values.dtype == object else np.nan], dtype=object if values.dtype == object else float
        )
        if (codes < 0).any():
            values = np.concatenate([values, last])
        return cast("np.ndarray", values[codes])  # -1 takes the appended missing value
    values = read_column(node["values"], start, stop)  # nullable integer, boolean or string
    mask = node["mask"][start:stop].astype(bool)
    if not mask.any():
        return values
    values = values.astype(object if values.dtype == object else np.float64)
    values[mask] = None if values.dtype == object else np.nan
    return values


def _widen(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


class RangeReader:
    """Ascending ranges of a 1-D dataset, read into the caller's arrays.

    Chunks without a filter, or with gzip alone, are read past HDF5: libdeflate decompresses about twice as fast.
    The last chunk stays in memory, so that none is decompressed twice.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset, self._id, self.dtype = dataset, dataset.id, dataset.dtype
        plist = dataset.id.get_create_plist()
        filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        self._rows = dataset.chunks[0] if dataset.chunks else 0
        self._unfiltered = not filters
        plain_type = self.dtype.isnative and self.dtype.kind in "iuf"
        self._direct = bool(self._rows) and plain_type and filters in ([], [h5py.h5z.FILTER_DEFLATE])
        self._number, self._values = -1, np.empty(0, self.dtype)

    def read(self, lo: int, hi: int, out: np.ndarray) -> None:
        """Read values [lo, hi) into `out`, an array of that length and of the dataset's type."""
        if hi <= lo:
            return
        if not self._direct:
            self._dataset.read_direct(out, np.s_[lo:hi])
            return
        rows = self._rows
        for number in range(lo // rows, (hi - 1) // rows + 1):
            begin = number * rows
            a, b = max(lo, begin), min(hi, begin + rows)
            to = out[a - lo : b - lo]
            if not (self._unfiltered and b - a == rows and self._stored(begin, to)):
                to[:] = self._chunk(number)[a - begin : b - begin]

    def _stored(self, begin: int, out: np.ndarray | None = None) -> Any:
        """Filter mask and stored bytes of a chunk (read into `out`, if given); None for a chunk that was never written."""
        try:
            return self._id.read_direct_chunk((begin,), out=None if out is None else out.view(np.uint8))
        except RuntimeError:
            return None

    def _chunk(self, number: int) -> np.ndarray:
        if number != self._number:
            begin = number * self._rows
            stored = self._stored(begin)
            if stored is None:  # never written: HDF5 gives the fill value
                return cast("np.ndarray", self._dataset[begin : begin + self._rows])
            skipped, data = stored
            if not (skipped or self._unfiltered):
                try:
                    data = deflate.zlib_decompress(data, self._rows * self.dtype.itemsize)
                except deflate.DeflateError as error:
                    msg = f"chunk {number} of {self._dataset.name} is truncated or damaged ({error})"
                    raise OSError(msg) from None
            self._values, self._number = np.frombuffer(data, self.dtype), number
        return self._values


def csr_blocks(matrix: h5py.Group, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    """Rows [start, stop) of a CSR group (data, indices, indptr), in blocks of `rows` rows; the arrays are reused."""
    indptr = matrix["indptr"][start : stop + 1].astype(np.int64)
    columns = RangeReader(matrix["data"]), RangeReader(matrix["indices"])
    firsts = np.arange(start, stop, rows) - start
    room = int((indptr[np.minimum(firsts + rows, stop - start)] - indptr[firsts]).max(initial=0))
    held = [np.empty(room, column.dtype) for column in columns]
    for a in range(start, stop, rows):
        p = indptr[a - start : min(a + rows, stop) - start + 1]
        lo, hi = int(p[0]), int(p[-1])
        data, indices = (values[: hi - lo] for values in held)
        for column, out in zip(columns, (data, indices), strict=True):
            column.read(lo, hi, out)
        yield RawBlock(a, data, indices.astype(np.int32, copy=False), p - lo)
