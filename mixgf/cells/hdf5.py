"""Moved here from mixgf/formats.py."""

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
def _h5(uri: str) -> Iterator[h5py.File]:
    options: dict[str, Any] = {"rdcc_nbytes": _CHUNK_CACHE}
    if files.is_local(uri):
        with files.local_copy(uri) as path, h5py.File(path, "r", **options) as file:
            yield file
        return
    with files.open_read(uri) as stream, h5py.File(stream, "r", **options) as file:
        yield file


def _strings(column: h5py.Group | h5py.Dataset, start: int, stop: int) -> np.ndarray:
    if isinstance(column, h5py.Group):
        values = _column(column, start, stop)
    elif h5py.check_string_dtype(column.dtype) is not None:
        return np.asarray(column.asstr()[start:stop], dtype=object)
    else:
        values = column[start:stop]
    return np.asarray([str(v) for v in values], dtype=object)


def _column(node: h5py.Group | h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """One column of a data frame on disk as float64, int64, or str objects (None where missing)."""
    if isinstance(node, h5py.Dataset):
        if h5py.check_string_dtype(node.dtype) is not None:
            return _strings(node, start, stop)
        return _plain(node[start:stop])
    if "codes" in node:
        codes = node["codes"][start:stop].astype(np.int64)
        categories = node["categories"]
        values = _column(categories, 0, categories.shape[0])
        last = np.asarray(
            [None if values.dtype == object else np.nan], dtype=object if values.dtype == object else float
        )
        if (codes < 0).any():
            values = np.concatenate([values, last])
        return cast("np.ndarray", values[codes])  # -1 takes the appended missing value
    values = _column(node["values"], start, stop)  # nullable integer, boolean or string
    mask = node["mask"][start:stop].astype(bool)
    if not mask.any():
        return values
    values = values.astype(object if values.dtype == object else np.float64)
    values[mask] = None if values.dtype == object else np.nan
    return values


def _plain(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


class _Column1D:
    """Ranges of a 1-D dataset, read in order, straight into the caller's arrays.

    Chunks that are not filtered, or by plain gzip, are read past HDF5 (libdeflate decompresses about twice as fast). One that
    a range only begins is kept for the next range, so that none is decompressed twice.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset, self._id, self.dtype = dataset, dataset.id, dataset.dtype
        plist = dataset.id.get_create_plist()
        filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        self._rows = dataset.chunks[0] if dataset.chunks else 0
        self._plain = not filters
        plain_type = self.dtype.isnative and self.dtype.kind in "iuf"
        self._direct = bool(self._rows) and plain_type and filters in ([], [h5py.h5z.FILTER_DEFLATE])
        self._number, self._values = -1, np.empty(0, self.dtype)

    def read(self, lo: int, hi: int, out: np.ndarray) -> None:
        """Values [lo, hi) into `out`, of that length and of this dataset's type."""
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
            if not (self._plain and b - a == rows and self._stored(begin, to)):
                to[:] = self._chunk(number)[a - begin : b - begin]

    def _stored(self, begin: int, out: np.ndarray | None = None) -> Any:
        """The filter mask and bytes (in `out`, where given) of a chunk as stored; None for one that was never written."""
        try:
            return self._id.read_direct_chunk((begin,), out=None if out is None else out.view(np.uint8))
        except RuntimeError:
            return None

    def _chunk(self, number: int) -> np.ndarray:
        if number != self._number:
            begin = number * self._rows
            stored = self._stored(begin)
            if stored is None:  # it holds the fill value
                return cast("np.ndarray", self._dataset[begin : begin + self._rows])
            skipped, data = stored
            if not (skipped or self._plain):
                try:
                    data = deflate.zlib_decompress(data, self._rows * self.dtype.itemsize)
                except deflate.DeflateError as error:
                    msg = f"chunk {number} of {self._dataset.name} is truncated or damaged ({error})"
                    raise OSError(msg) from None
            self._values, self._number = np.frombuffer(data, self.dtype), number
        return self._values


def _csr_blocks(matrix: h5py.Group, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    indptr = matrix["indptr"][start : stop + 1].astype(np.int64)
    columns = _Column1D(matrix["data"]), _Column1D(matrix["indices"])
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
