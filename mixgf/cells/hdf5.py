"""HDF5 on local disk or object storage: files, and ranges of arrays, read past HDF5 where possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from typing import Any, cast

import deflate
import h5py
import numpy as np

from mixgf.errors import UserError
from mixgf.storage import files
from mixgf.storage.s3 import RangeFile, ReadAhead

_CHUNK_CACHE = 32 << 20
_REMOTE: dict[str, RangeFile] = {}
"""Open files on object storage, by the name that h5py gives them."""


@contextmanager
def open_hdf5(uri: str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; a file on object storage is read in ranges, not downloaded."""
    options: dict[str, Any] = {"rdcc_nbytes": _CHUNK_CACHE}
    if files.is_local(uri):
        with files.local_copy(uri) as path, h5py.File(path, "r", **options) as file:
            yield file
        return
    with files.open_read(uri) as stream, h5py.File(stream, "r", **options) as file:
        name, raw = file.filename, getattr(stream, "raw", None)
        if isinstance(raw, RangeFile) and not file.userblock_size:
            _REMOTE[name] = raw
        try:
            yield file
        finally:
            _REMOTE.pop(name, None)


def child(group: Any, name: str) -> Any:
    """A node of an HDF5 group or a Zarr group; in HDF5 its data must lie in the file itself.

    Raises:
        ValueError: an external link, external storage or a virtual data set, which could show another file's content.
    """
    node = group[name]
    if isinstance(group, h5py.Group):
        what = ""
        if h5py.h5f.get_name(node.id) != h5py.h5f.get_name(group.id):
            what = "an external link"
        elif isinstance(node, h5py.Dataset) and node.is_virtual:
            what = "a virtual data set"
        elif isinstance(node, h5py.Dataset) and node.external:
            what = "external storage"
        if what:
            msg = f"{group.name.rstrip('/')}/{name} lies in another file ({what}), which is not read"
            raise ValueError(msg)
    return node


def require_filters(uri: str, *arrays: Any) -> None:
    """Check that HDF5 can decompress these arrays; arrays of Zarr pass.

    Raises:
        UserError: a filter is not installed.
    """
    for array in arrays:
        if not isinstance(array, h5py.Dataset):
            continue
        plist = array.id.get_create_plist()
        for number, _, _, name in (plist.get_filter(i) for i in range(plist.get_nfilters())):
            if not h5py.h5z.filter_avail(number):
                with suppress(ImportError):  # it brings the filters that are in use, where it is installed
                    import_module("hdf5plugin")
            if not h5py.h5z.filter_avail(number):
                known = name.decode() or {32001: "blosc", 32004: "lz4", 32015: "zstd", 32026: "blosc2"}.get(
                    number, "unknown"
                )
                what = f"compressed by the HDF5 filter {number} ({known}), which is not installed"
                raise UserError(
                    f"{uri}: {what}; run: pip install hdf5plugin, or write the file again with compression='gzip'"
                )


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
        self._ahead: ReadAhead | None = None
        self._places: dict[int, tuple[int, int, int]] = {}
        """Filter mask, start and stop in the file of chunks, by their first value."""

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
        if self._ahead is not None and begin in self._places:
            mask, start, stop = self._places[begin]
            data = self._ahead.read(start, stop)
            if out is not None:
                out.view(np.uint8)[:] = data
            return mask, data
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


@contextmanager
def read_ahead(columns: Sequence[RangeReader], lo: int, hi: int) -> Iterator[None]:
    """Request the chunks of values [lo, hi) of several datasets of one file on object storage before they are read."""
    file = _REMOTE.get(columns[0]._dataset.file.filename)
    if file is None or hi <= lo or not all(column._direct for column in columns):
        yield
        return
    places = sorted(
        (begin, k, info)
        for k, column in enumerate(columns)
        for begin in range(lo // column._rows * column._rows, hi, column._rows)
        if (info := column._id.get_chunk_info_by_coord((begin,))).byte_offset is not None
    )
    with closing(ReadAhead(file, [(i.byte_offset, i.byte_offset + i.size) for _, _, i in places])) as ahead:
        for begin, k, info in places:
            columns[k]._places[begin] = info.filter_mask, info.byte_offset, info.byte_offset + info.size
        for column in columns:
            column._ahead = ahead
        try:
            yield
        finally:
            for column in columns:
                column._ahead = None
