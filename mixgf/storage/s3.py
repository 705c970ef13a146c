"""Requests to object storage, and remote files that are read by ranges.

Endpoint, region and keys are those of any AWS client (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...). Other options are
those of fsspec's file systems, by fsspec's own variables (FSSPEC_S3_ANON=true, FSSPEC_S3_REQUESTER_PAYS=true, FSSPEC_GS_TOKEN=anon,
FSSPEC_AZ_ACCOUNT_NAME=...). s3fs and botocore are imported at the first request, since local runs need neither.
"""

from __future__ import annotations

import contextlib
import io
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar, cast

import fsspec
import fsspec.config

from mixgf import proxies
from mixgf.errors import UserError, require_package
from mixgf.storage import retry
from mixgf.storage.retry import error_code, with_retries

T = TypeVar("T")
CONNECT_SECONDS = 5
READ_SECONDS = 30
"""Longest wait for a server's answer before the request is repeated."""
BUFFER_BYTES = 64 << 10
PACKAGES = {
    "s3": ("s3fs", "s3://", "mixgf[s3]"),
    "gs": ("gcsfs", "gs://", "mixgf[gs]"),
    "az": ("adlfs", "az://", "mixgf[az]"),
}
"""Schemes, with the package that reads each and the extra that installs it."""
WHOLE_BYTES = 32 << 20
"""Most bytes that one request asks for of a file that is read whole."""
CONNECTIONS = 32
"""Kept open to a store by one process."""
GAP_BYTES = 64 << 10
"""Bytes that are read for nothing rather than with a further request."""
FIRST_BYTES, NUM_BLOCKS = 96 << 10, 8
"""First read-ahead, and blocks that a file keeps."""


def filesystem_and_key(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the file's key in it."""
    protocol, _, key = uri.partition("://")
    return _filesystem(protocol, os.getpid(), _settings()), key


def async_filesystem(uri: str) -> Any:
    """The fsspec file system of a URI for a caller with an event loop of its own (Zarr)."""
    return _filesystem(uri.partition("://")[0], os.getpid(), _settings(), asynchronous=True)


def tiledb_options() -> dict[str, str]:
    """The settings of s3:// as options of TileDB, which reads keys and regions itself as any AWS client does."""
    fs, _ = filesystem_and_key("s3://")
    endpoint = fs.endpoint_url or retry.endpoint()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    options = {"vfs.s3.no_sign_request": "true"} if fs.anon else {}
    options |= {"vfs.s3.request_payer": "requester"} if fs.req_kw else {}
    if region:
        options["vfs.s3.region"] = region
    if endpoint:
        scheme, _, host = endpoint.partition("://")
        options |= {"vfs.s3.scheme": scheme, "vfs.s3.endpoint_override": host, "vfs.s3.use_virtual_addressing": "false"}
    return options


def _settings() -> tuple[tuple[str, str], ...]:
    named = ("AWS_", "FSSPEC_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_HOST")
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(named)))


def _options() -> dict[str, Any]:
    """Options of `botocore.config.Config`. botocore itself reads the region from AWS_DEFAULT_REGION only."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    return {
        "connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "region_name": region, "max_pool_connections": CONNECTIONS,
    }  # fmt: skip


@cache
def _client(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    """A botocore client with the settings of the file system of s3://."""
    import botocore.config
    import botocore.session

    fs, options = _filesystem("s3", pid, settings), _options()
    if fs.anon:
        options["signature_version"] = botocore.UNSIGNED
    keys = {"aws_access_key_id": fs.key, "aws_secret_access_key": fs.secret, "aws_session_token": fs.token}
    return botocore.session.get_session().create_client(
        "s3", config=botocore.config.Config(**options), endpoint_url=fs.endpoint_url, **keys
    )


@cache
def _filesystem(protocol: str, pid: int, settings: tuple[tuple[str, str], ...], *, asynchronous: bool = False) -> Any:
    # one per process, since connections do not survive a fork; no cached listings, since other workers write too
    if protocol in ("http", "https"):
        msg = f"{protocol}:// is not read: download the file first (curl -LO URL), and give its path"
        raise UserError(msg)
    if protocol in PACKAGES:
        require_package(*PACKAGES[protocol])
    found: dict[str, dict[str, Any]] = {}
    fsspec.config.set_conf_env(found)  # fsspec itself reads the environment once, at its import
    options = found.get(protocol, {})
    if protocol == "s3":
        options["config_kwargs"] = options.get("config_kwargs", {}) | _options()
    try:
        fs = fsspec.filesystem(
            protocol, use_listings_cache=False, skip_instance_cache=True, asynchronous=asynchronous, **options
        )
    except (ValueError, TypeError, ImportError) as error:
        msg = f"{protocol}:// is not a known storage: use a local path or {', '.join(f'{p}://' for p in PACKAGES)} ({error})"
        raise UserError(msg) from None
    if protocol == "s3":
        proxies.go_past(fs.endpoint_url or retry.endpoint())
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


def listed_sizes(folder: str, names: Collection[str]) -> dict[str, int]:
    """Bytes of files of an s3:// folder by name, from pages of its listing; those that it lacks are left out.

    A page has 1,000 names, in order. The listing begins with the first wanted name and ends after the last one, or after as many
    requests as there are names: in a folder with many other files, it is cheaper to ask for each file.
    """
    fs, key = filesystem_and_key(folder.rstrip("/") + "/")
    bucket, _, prefix = key.partition("/")
    client, first, last = _client(os.getpid(), _settings()), prefix + min(names), prefix + max(names)
    where: dict[str, str] = {"StartAfter": first[:-1]}
    found: dict[str, int] = {}
    for _ in range(len(names)):
        options = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", **where, **fs.req_kw}
        page = with_retries(folder, partial(client.list_objects_v2, **options))
        keys = {item["Key"]: int(item["Size"]) for item in page.get("Contents", ())}
        found.update({name: keys[prefix + name] for name in names if prefix + name in keys})
        if not page["IsTruncated"] or max(keys, default="") >= last:
            break
        where = {"ContinuationToken": page["NextContinuationToken"]}
    return found


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
    same = ({"IfMatch": etag} if etag else {}) | fs.req_kw

    def fetch(start: int, stop: int) -> bytes:
        body = client.get_object(Bucket=bucket, Key=name, Range=f"bytes={start}-{stop - 1}", **same)["Body"]
        try:
            return cast("bytes", body.read())
        finally:
            body.close()

    return fetch


def read_whole(uri: str) -> bytes:
    """A file of s3://, by one request if it has at most `WHOLE_BYTES`.

    A range is asked for, even of a small file: the answer then says how many bytes the file has, and one that is cut short on the
    way is known as such, and asked for again.
    """
    fs, key = filesystem_and_key(uri)
    bucket, name, _ = fs.split_path(key)
    client = _client(os.getpid(), _settings())

    def get() -> tuple[bytes, int, str]:
        try:
            answer = client.get_object(Bucket=bucket, Key=name, Range=f"bytes=0-{WHOLE_BYTES - 1}", **fs.req_kw)
        except Exception as error:
            if error_code(error) not in ("InvalidRange", "416"):
                raise
            return b"", 0, ""  # an empty file has no range
        with contextlib.closing(answer["Body"]) as body:
            data = cast("bytes", body.read())
        total = int(str(answer.get("ContentRange", len(data))).rpartition("/")[2])
        require_length(len(data), min(total, WHOLE_BYTES) if "ContentRange" in answer else len(data))
        return data, total, answer.get("ETag", "")

    data, total, etag = with_retries(uri, get)
    if len(data) == total:
        return data
    file = RangeFile(uri, range_reader(uri, etag), total, WHOLE_BYTES)
    starts = range(len(data), total, WHOLE_BYTES)
    with ThreadPoolExecutor(4) as pool:
        return b"".join([data, *pool.map(lambda at: file.read_range(at, min(at + WHOLE_BYTES, total)), starts)])


def require_length(found: int, wanted: int) -> None:
    """Raise an `EOFError`, after which a request is repeated, if an answer has another number of bytes than it must have."""
    if found != wanted:
        msg = f"the answer broke off after {found} of {wanted} bytes"
        raise EOFError(msg)


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
            return self.read_range(start, stop)
        for i, (at, data) in enumerate(self.blocks):
            if at <= start and stop <= at + len(data):
                self.blocks.append(self.blocks.pop(i))
                break
        else:
            ahead = max(
                (2 * len(data) for at, data in self.blocks if at <= start <= at + len(data)), default=FIRST_BYTES
            )
            wanted = max(stop, min(start + min(ahead, self.most), self.num_bytes))
            self.blocks = [*self.blocks[1 - NUM_BLOCKS :], (start, self.read_range(start, wanted))]
        at, data = self.blocks[-1]
        return memoryview(data)[start - at : stop - at]

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), by one request; may be called from several threads."""

        def get() -> bytes:
            data = self.fetch(start, stop)
            require_length(len(data), stop - start)
            return data

        return with_retries(self.uri, get)


class ReadAhead:
    """Byte ranges of a remote file, requested by other threads before they are asked for.

    Ranges that lie close together are one request. What came is held until all its ranges were read, each of them once.

    HDF5 must not be in a call while `read` waits: the other threads may free objects of h5py, for which they need its lock.

    Args:
        file: the file.
        ranges: start and stop of each, about in the order in which they are read.
        requests: most requests at a time.
    """

    def __init__(self, file: RangeFile, ranges: Sequence[tuple[int, int]], *, requests: int = 3) -> None:
        self._file, self._requests = file, requests
        parts: list[tuple[int, int, int, int]] = []  # place of the first range, start, stop, number of ranges
        for place, (start, stop) in sorted(enumerate(ranges), key=lambda entry: entry[1]):
            if parts and start - parts[-1][2] <= GAP_BYTES and stop - parts[-1][1] <= file.most:
                first, begin, end, number = parts[-1]
                parts[-1] = min(first, place), begin, max(end, stop), number + 1
            else:
                parts.append((place, start, stop, 1))
        self._parts = sorted(parts)
        self._starts = sorted((part[1], i) for i, part in enumerate(self._parts))
        self._unread = [part[3] for part in self._parts]
        self._running: dict[int, Future[bytes]] = {}
        self._next = 0
        self._pool = ThreadPoolExecutor(requests)

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes of one of the ranges."""
        i = self._starts[bisect_right(self._starts, (start, len(self._parts))) - 1][1]
        while self._next < len(self._parts) and self._next <= i + self._requests:
            self._running[self._next] = self._request(self._next)
            self._next += 1
        if i not in self._running:
            self._running[i] = self._request(i)
        _, begin, end, _ = self._parts[i]
        assert begin <= start <= stop <= end, (start, stop)
        data = self._running[i].result()
        self._unread[i] -= 1
        if not self._unread[i]:
            del self._running[i]
        return memoryview(data)[start - begin : stop - begin]

    def _request(self, i: int) -> Future[bytes]:
        return self._pool.submit(self._file.read_range, *self._parts[i][1:3])

    def close(self) -> None:
        """Request no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
