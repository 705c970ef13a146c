"""Moved here from mixgf/storage.py."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import fsspec

from mixgf.errors import UserError, require_package
from mixgf.storage.retry import patiently

T = TypeVar("T")
CONNECT_SECONDS = 5
READ_SECONDS = 30
"""Longest silence of a server before a request is given up and made again."""
_BUFFER = 64 << 10
_FIRST, _BLOCKS = 128 << 10, 8


def _remote(uri: str) -> tuple[Any, str]:
    protocol, _, key = uri.partition("://")
    return _filesystem(protocol, os.getpid(), _settings()), key


def _settings() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def _options() -> dict[str, Any]:
    """Options of `botocore.config.Config`. Of the two names for the region botocore itself reads AWS_DEFAULT_REGION only."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    return {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "region_name": region}


@cache
def _client(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    import botocore.config
    import botocore.session

    return botocore.session.get_session().create_client("s3", config=botocore.config.Config(**_options()))


@cache
def _filesystem(protocol: str, pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    # keyed by process: connections do not survive a fork; no cached listings: other workers write too
    options: dict[str, Any] = {}
    if protocol == "s3":
        require_package("s3fs", "s3://", "mixgf[s3]")
        options["config_kwargs"] = _options()
    try:
        fs = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **options)
    except (ValueError, ImportError) as error:
        msg = f"{protocol}:// is not a known storage: use a local path or s3:// ({error})"
        raise UserError(msg) from None
    fs.retries = 1  # s3fs multiplies botocore's attempts by 5, and by 25 where it reads ranges
    return fs


def forget_connections() -> None:
    """Open new connections from here on, with the settings of the environment."""
    _filesystem.cache_clear()
    _client.cache_clear()


def _ask(uri: str, call: Callable[[Any, str], T]) -> T:
    """Make a call of the file system with a key of it; raises what `patiently` does."""
    fs, key = _remote(uri)
    return patiently(uri, lambda: call(fs, key))


def _fetcher(uri: str, etag: str) -> Callable[[int, int], bytes]:
    """What gets bytes [start, stop) of a remote file, in the calling thread.

    HDF5 reads while it holds h5py's lock. A file of s3fs waits meanwhile for a thread of its own, and that thread waits for the
    lock for ever when Python's garbage collector runs there and finds an HDF5 object (seen with h5py 3.16). So ranges are read
    by a plain client.
    """
    fs, key = _remote(uri)
    if not uri.startswith("s3://"):
        return lambda start, stop: fs.cat_file(key, start=start, end=stop)
    bucket, name, _ = fs.split_path(key)
    client = _client(os.getpid(), _settings())
    same = {"IfMatch": etag} if etag else {}

    def fetch(start: int, stop: int) -> bytes:
        body = client.get_object(Bucket=bucket, Key=name, Range=f"bytes={start}-{stop - 1}", **same)["Body"]
        try:
            return cast("bytes", body.read())
        finally:
            body.close()

    return fetch


class _Ranges(io.RawIOBase):
    """A remote file read by ranges, each whole or not at all.

    Reading ahead begins small and doubles, up to `most` bytes, where one read follows another; a few places are followed at once,
    because HDF5 jumps between its parts.
    """

    def __init__(self, uri: str, fetch: Callable[[int, int], bytes], num_bytes: int, most: int) -> None:
        self.uri, self.fetch, self.num_bytes, self.most = uri, fetch, num_bytes, most
        self.position = 0
        self.blocks: list[tuple[int, bytes]] = []
        """Start and bytes, the last used at the end."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.num_bytes}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start = self.position
        stop = max(start, min(start + len(view), self.num_bytes))
        view[: stop - start] = self._bytes(start, stop)
        self.position = stop
        return stop - start

    def _bytes(self, start: int, stop: int) -> bytes | memoryview:
        if start == stop:
            return b""
        if stop - start >= self.most:
            return self._get(start, stop)
        for i, (at, data) in enumerate(self.blocks):
            if at <= start and stop <= at + len(data):
                self.blocks.append(self.blocks.pop(i))
                break
        else:
            ahead = max((2 * len(data) for at, data in self.blocks if at <= start <= at + len(data)), default=_FIRST)
            wanted = max(stop, min(start + min(ahead, self.most), self.num_bytes))
            self.blocks = [*self.blocks[1 - _BLOCKS :], (start, self._get(start, wanted))]
        at, data = self.blocks[-1]
        return memoryview(data)[start - at : stop - at]

    def _get(self, start: int, stop: int) -> bytes:
        def get() -> bytes:
            data = self.fetch(start, stop)
            if len(data) != stop - start:
                msg = f"{len(data)} of {stop - start} bytes came"
                raise EOFError(msg)
            return data

        return patiently(self.uri, get)
