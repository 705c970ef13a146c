"""Groups and arrays of a Zarr store (format 2 or 3, sharded or not), with the interface of h5py's that readers use.

Zarr's rule is that a chunk that is not in the store holds the fill value, 0. So an array of which chunks were lost reads as
zeros. Values and columns of a sparse matrix show it (`RangeReader`), a dense matrix does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from mixgf.errors import require_package
from mixgf.storage import files
from mixgf.storage.retry import with_retries

T = TypeVar("T")
WINDOW = 1 << 20
"""Values of a sparse matrix that are read at a time: small chunks of object storage come many at once."""


class _Node:
    def __init__(self, uri: str, node: Any, parent: ZarrGroup | None) -> None:
        self.uri, self._node, self._parent = uri, node, parent

    def _ask(self, call: Callable[[], T]) -> T:
        return call() if files.is_local(self.uri) else with_retries(self.uri, call)

    @property
    def name(self) -> str:
        """Path within the store."""
        return str(self._node.path)

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Attributes."""
        return self._node.attrs.asdict()

    @property
    def parent(self) -> ZarrGroup:
        """The group that holds the node."""
        assert self._parent is not None
        return self._parent


class ZarrArray(_Node):
    """An array of a store."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._node.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self._node.dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of what is compressed as one piece (in a sharded array: within a shard)."""
        return tuple(self._node.chunks)

    def __getitem__(self, key: Any) -> np.ndarray:
        return np.asarray(self._ask(lambda: self._node[key]))


class ZarrGroup(_Node):
    """A group of a store."""

    def __contains__(self, name: str) -> bool:
        return self._ask(lambda: name in self._node)

    def __getitem__(self, name: str) -> ZarrGroup | ZarrArray:
        group, _, rest = name.partition("/")
        node = self._ask(lambda: self._node[group])
        if not hasattr(node, "members"):
            return ZarrArray(self.uri, node, self)
        found = ZarrGroup(self.uri, node, self)
        return found[rest] if rest else found

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._ask(lambda: list(self._node))))


@contextmanager
def open_zarr(uri: str) -> Iterator[ZarrGroup]:
    """Open a Zarr store for reading: a folder on local disk or object storage, or a local .zip."""
    require_package("zarr", uri, "mixgf[zarr]")
    import zarr  # noqa: PLC0415 (an extra)

    with files.zarr_store(uri) as store:
        root = ZarrGroup(uri, None, None)
        root._node = root._ask(lambda: zarr.open_group(store, mode="r"))
        yield root


class RangeReader:
    """Ascending ranges of a 1-D array, read into the caller's arrays, through a window of whole chunks.

    Args:
        array: The array.
        stored: Whether the array holds stored values, of which a whole chunk of zeros means that the chunk is lost.
    """

    def __init__(self, array: ZarrArray, *, stored: bool) -> None:
        self.dtype, self._array, self._length, self._stored = array.dtype, array, array.shape[0], stored
        self._chunk = max(1, array.chunks[0])
        self._window = self._chunk * max(1, WINDOW // self._chunk)
        self._begin, self._values = 0, np.empty(0, array.dtype)

    def read(self, lo: int, hi: int, out: np.ndarray) -> None:
        """Read values [lo, hi) into `out`, an array of that length."""
        while lo < hi:
            if not self._begin <= lo < self._begin + len(self._values):
                self._begin = lo // self._window * self._window
                self._values = self._array[self._begin : min(self._begin + self._window, self._length)]
                if self._stored and len(self._values):
                    full = np.logical_or.reduceat(self._values != 0, np.arange(0, len(self._values), self._chunk))
                    if not full.all():
                        number = self._begin // self._chunk + int(np.argmin(full))
                        msg = f"chunk {number} of {self._array.name} is not in the store"
                        raise EOFError(msg)
            a, z = lo - self._begin, min(hi - self._begin, len(self._values))
            out[: z - a] = self._values[a:z]
            out, lo = out[z - a :], lo + z - a
