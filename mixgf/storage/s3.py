"""Requests to object storage, and remote files that are read by ranges.

Endpoint, region and keys are those of any AWS client (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...). s3fs and botocore
are imported at the first request, since local runs need neither.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import fsspec

from mixgf.errors import UserError, require_package
from mixgf.storage.retry import with_retries

T = TypeVar("T")
CONNECT_SECONDS = 5
READ_SECONDS = 30
"""Longest wait for a server's answer before the request is repeated."""
BUFFER_BYTES = 64 << 10
FIRST_BYTES, NUM_BLOCKS = 128 << 10, 8
"""First read-ahead, and blocks that a file keeps."""


def filesystem_and_key(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the file's key in it."""
    protocol, _, key = uri.partition("://")
    return _filesystem(protocol, os.getpid(), _settings()), key


def async_filesystem(uri: str) -> Any:
    """The fsspec file system of a URI for a caller with an event loop of its own (Zarr)."""
    return _filesystem(uri.partition("://")[0], os.getpid(), _settings(), asynchronous=True)


def _settings() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


def _options() -> dict[str, Any]:
    """Options of `botocore.config.Config`. botocore itself reads the region from AWS_DEFAULT_REGION only."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    return {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "region_name": region}


@cache
def _client(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    import botocore.config
    import botocore.session

    return botocore.session.get_session().create_client("s3", config=botocore.config.Config(**_options()))


@cache
def _filesystem(protocol: str, pid: int, settings: tuple[tuple[str, str], ...], *, asynchronous: bool = False) -> Any:
    # one per process, since connections do not survive a fork; no cached listings, since other workers write too
    options: dict[str, Any] = {}
    if protocol == "s3":
        require_package("s3fs", "s3://", "mixgf[s3]")
        options["config_kwargs"] = _options()
    try:
        fs = fsspec.filesystem(
            protocol, use_listings_cache=False, skip_instance_cache=True, asynchronous=asynchronous, **options
        )
    except (ValueError, ImportError) as error:
        msg = f"{protocol}:// is not a known storage: use a local path or s3:// ({error})"
        raise UserError(msg) from None
    fs.retries = 1  # s3fs multiplies botocore's attempts by 5, and by 25 where it reads ranges
    return fs


def forget_connections() -> None:
    """Open new connections from now on, with the present settings of the environment."""
    _filesystem.cache_clear()
    _client.cache_clear()


def request(uri: str, call: Callable[[Any, str], T]) -> T:
    """Call `call(file system, key)` with retries; raises what `with_retries` raises."""
    fs, key = filesystem_and_key(uri)
    return with_retries(uri, lambda: call(fs, key))


def range_reader(uri: str, etag: str) -> Callable[[int, int], bytes]:
    """A function that returns bytes [start, stop) of a remote file, read in the calling thread.

    s3fs reads in a thread of its own, which can deadlock with h5py: HDF5 holds h5py's lock while it waits for the bytes. If
    Python's garbage collector frees an HDF5 object in the reading thread, that thread waits for the lock (seen with h5py 3.16).
    A plain botocore client has no such thread.

    Args:
        uri: Of the file.
        etag: Of its content: a file that was written again meanwhile is an error. "" = no check.
    """
    fs, key = filesystem_and_key(uri)
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


class RangeFile(io.RawIOBase):
    """A remote file that is read by ranges.

    Read-ahead starts at `FIRST_BYTES` and doubles, up to `most` bytes, while reads follow each other. `NUM_BLOCKS` blocks are
    kept, because HDF5 alternates between several places of a file.
    """

    def __init__(self, uri: str, fetch: Callable[[int, int], bytes], num_bytes: int, most: int) -> None:
        self.uri, self.fetch, self.num_bytes, self.most = uri, fetch, num_bytes, most
        self.position = 0
        self.blocks: list[tuple[int, bytes]] = []
        """Start and bytes of the kept blocks, the last used one at the end."""

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
            ahead = max(
                (2 * len(data) for at, data in self.blocks if at <= start <= at + len(data)), default=FIRST_BYTES
            )
            wanted = max(stop, min(start + min(ahead, self.most), self.num_bytes))
            self.blocks = [*self.blocks[1 - NUM_BLOCKS :], (start, self._get(start, wanted))]
        at, data = self.blocks[-1]
        return memoryview(data)[start - at : stop - at]

    def _get(self, start: int, stop: int) -> bytes:
        def get() -> bytes:
            data = self.fetch(start, stop)
            if len(data) != stop - start:
                msg = f"the answer broke off after {len(data)} of {stop - start} bytes"
                raise EOFError(msg)
            return data

        return with_retries(self.uri, get)
