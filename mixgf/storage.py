"""The only home of file systems: local paths, `s3://` URIs and `resource:` files inside the package.

Every write is atomic: a reader sees the old object, the new one, or none, whatever kills the writer. Locally that is a
temporary file in the same folder and a rename; on object storage one PUT, or one completed multipart upload from 100 MB.

Object storage is asked patiently (`mixgf.patience`). What fails all the same is a `StorageError`, never the error of a
damaged file, so that readers can tell a fault of the network from one of the file. Endpoint, region and keys are those of
any AWS client (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...); an endpoint of one's own is addressed by path.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import botocore.config
import botocore.session
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mixgf.config import AccessError, UserError
from mixgf.patience import code, patiently

T = TypeVar("T")

# most stores that are not AWS refuse the newer default checksums (HTTP 411 on UploadPart)
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
# every request: 4 attempts, in 7 s at most beyond the server's own time
os.environ.setdefault("AWS_RETRY_MODE", "standard")
os.environ.setdefault("AWS_MAX_ATTEMPTS", "4")
CONNECT_SECONDS = 5
READ_SECONDS = 30
"""Longest silence of a server before a request is given up and made again."""
PART_BYTES = 50 << 20
"""Of a multipart upload, which objects of twice that size and more go by."""
_TEMPORARY = ".writing-"
_REMOVALS = 5
"""Times that a local folder is removed while another process writes there."""
_BUFFER = 64 << 10
_FIRST, _BLOCKS = 128 << 10, 8


def _resource(uri: str) -> str:
    path = resources.files("mixgf") / "resources" / uri.removeprefix("resource:")
    return str(path)


def is_local(uri: str) -> bool:
    """Whether the URI names this machine's disk."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path behind a local URI."""
    assert is_local(uri), uri
    return Path(_resource(uri) if uri.startswith("resource:") else uri.removeprefix("file://")).expanduser()


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
    return botocore.session.get_session().create_client("s3", config=botocore.config.Config(**_options()))


@cache
def _filesystem(protocol: str, pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    # keyed by process: connections do not survive a fork; no cached listings: other workers write too
    options: dict[str, Any] = {}
    if protocol == "s3":
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


def join(uri: str, *parts: str) -> str:
    """The URI of something inside a folder."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(uri):
        return local_path(uri).exists()
    return _ask(uri, lambda fs, key: bool(fs.exists(key)))


def is_folder(uri: str) -> bool:
    """Whether a folder is there, not a file."""
    if is_local(uri):
        return local_path(uri).is_dir()
    return _ask(uri, lambda fs, key: bool(fs.isdir(key)))


def size(uri: str) -> int:
    """Bytes of a file."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    return _ask(uri, lambda fs, key: int(fs.size(key)))


def list_dir(uri: str) -> list[str]:
    """Names of what lies directly in a folder, sorted; empty when there is no such folder."""
    if is_local(uri):
        path = local_path(uri)
        return sorted(p.name for p in path.iterdir() if not p.name.startswith(_TEMPORARY)) if path.is_dir() else []
    try:
        found = _ask(uri, lambda fs, key: fs.ls(key, detail=False))
    except FileNotFoundError:
        return []
    itself = uri.partition("://")[2].rstrip("/")  # as a file, or as the empty object that some tools make of a folder
    return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in found if str(name).rstrip("/") != itself)


def glob(uri: str) -> list[str]:
    """URIs that match a pattern, sorted; a URI without wildcards is returned if it exists."""
    if is_local(uri):
        if uri.startswith("resource:"):
            return [uri] if exists(uri) else []
        path = local_path(uri)
        if path.exists():
            return [uri]
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        return sorted(str(p) for p in anchor.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))
    if exists(uri):
        return [uri]
    protocol = uri.partition("://")[0]
    return sorted(f"{protocol}://{found}" for found in _ask(uri, lambda fs, key: fs.glob(key)))


def read_bytes(uri: str) -> bytes:
    """The whole of a file."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    return cast("bytes", _ask(uri, lambda fs, key: fs.cat_file(key)))


def open_read(uri: str, block_size: int = 4 << 20) -> BinaryIO:
    """A seekable binary file; on object storage it reads ranges, up to `block_size` bytes ahead."""
    if is_local(uri):
        return cast("BinaryIO", local_path(uri).open("rb"))
    facts = _ask(uri, lambda fs, key: fs.info(key))
    if facts["type"] != "file":
        raise FileNotFoundError(uri)
    return io.BufferedReader(
        _Ranges(uri, _fetcher(uri, facts.get("ETag", "")), int(facts["size"]), block_size), _BUFFER
    )


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


@contextmanager
def open_arrow(uri: str) -> Iterator[pa.NativeFile]:
    """A seekable pyarrow file: mapped into memory from disk, read in ranges from object storage."""
    if is_local(uri):
        with pa.memory_map(str(local_path(uri))) as file:
            yield file
        return
    with open_read(uri) as stream, pa.PythonFile(stream, mode="r") as file:
        yield file


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file atomically."""
    if is_local(uri):
        with _replacing(local_path(uri)) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return
    whole = bytes(data)
    _put(uri, lambda fs, key: fs.pipe_file(key, whole, chunksize=_part_bytes(len(whole))))


def _part_bytes(total: int) -> int:
    return max(PART_BYTES, -(-total // 10_000))  # S3 takes 10,000 parts


def _put(uri: str, call: Callable[[Any, str], Any]) -> None:
    try:
        _ask(uri, call)
    except FileNotFoundError as error:
        msg = f"{uri}: cannot be written ({error}); make the bucket first"
        raise AccessError(msg) from None


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file that is not there yet; of several writers at once one succeeds.

    Object storage decides by the condition `If-None-Match: *`. A store that ignores it takes every writer's: read back
    what stands there. `data` should be the writer's own (hold a time, a name): it tells whether a PUT whose answer was lost
    had arrived.

    Returns:
        Whether the file is now this one; False when another one is there.
    """
    if is_local(uri):
        path = local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(data)
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True
    with suppress(FileExistsError):
        _put(uri, _create(data))
    return read_bytes(uri) == data


def _create(data: bytes) -> Callable[[Any, str], None]:
    def call(fs: Any, key: str) -> None:
        try:
            fs.pipe_file(key, data, mode="create")
        except OSError as error:
            if code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise FileExistsError(str(error)) from None
            if code(error) not in ("NotImplemented", "501"):
                raise
            fs.pipe_file(key, data)

    return call


def upload(path: Path, uri: str) -> None:
    """Publish one local file atomically."""
    if is_local(uri):
        with _replacing(local_path(uri)) as temporary:
            shutil.copyfile(path, temporary)
        return
    _put(uri, lambda fs, key: fs.put_file(str(path), key, chunksize=_part_bytes(path.stat().st_size)))


def copy(uri: str, to: str) -> None:
    """Copy one file atomically: a hard link on one disk, a copy by the server within object storage."""
    if is_local(uri) and is_local(to):
        with _replacing(local_path(to)) as temporary:
            try:
                temporary.hardlink_to(local_path(uri))
            except OSError:  # another disk, or one without links
                shutil.copyfile(local_path(uri), temporary)
    elif is_local(uri):
        upload(local_path(uri), to)
    elif is_local(to) or uri.partition("://")[0] != to.partition("://")[0]:
        with local_copy(uri) as path:
            upload(path, to)
    else:
        _ask(uri, lambda fs, key: fs.cp_file(key, _remote(to)[1]))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path to a file: the file itself, or a download that is removed afterwards."""
    if is_local(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="mixgf-") as folder:
        path = Path(folder) / uri.rsplit("/", 1)[-1]
        _ask(uri, lambda fs, key: fs.get_file(key, str(path)))
        yield path


def remove(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing there is fine, and so is another process that writes or deletes there."""
    if is_local(uri):
        path = local_path(uri)
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        for attempt in range(_REMOVALS):
            try:
                shutil.rmtree(path, onerror=_not_there_is_fine)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or attempt == _REMOVALS - 1:
                    raise
            else:
                return
        return
    if exists(uri):
        _ask(uri, lambda fs, key: fs.rm(key, recursive=True))


def _not_there_is_fine(_: object, __: object, error: tuple[Any, Any, Any]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


def sha256(uri: str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open_read(uri) as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(uri: str) -> Any:
    """A JSON file's value."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file atomically, with sorted keys."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file's table."""
    with open_read(uri) as file:
        return pq.read_table(file, columns=columns, use_threads=False)


class _Summed(io.RawIOBase):
    """Writes to a file, and knows length and SHA-256 of what was written."""

    def __init__(self, file: io.RawIOBase) -> None:
        self.file, self.num_bytes, self.digest = file, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        whole = len(left)
        self.digest.update(left)
        self.num_bytes += whole
        while len(left):
            left = left[self.file.write(left) :]
        return whole


def write_table(uri: str, table: pa.Table, **options: Any) -> tuple[int, str]:
    """Write a Parquet file atomically; the same table and options give the same bytes. Returns (bytes, sha256)."""
    return write_tables(uri, table.schema, [table], **options)


def write_tables(
    uri: str, schema: pa.Schema, tables: Iterable[pa.Table], *, row_group_size: int | None = None, **options: Any
) -> tuple[int, str]:
    """`write_table` of several tables, one after the other, each in row groups of its own: nothing is held but the present one."""

    def write(sink: pa.NativeFile) -> None:
        with pq.ParquetWriter(sink, schema, **({"compression": "zstd"} | options)) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=row_group_size)

    if is_local(uri):  # past memory: what is written is never held as a whole
        with _replacing(local_path(uri)) as temporary, temporary.open("wb", buffering=0) as file:
            summed = _Summed(file)
            with pa.PythonFile(summed, mode="w") as sink:
                write(sink)
            os.fsync(file.fileno())
        return summed.num_bytes, summed.digest.hexdigest()
    stream = pa.BufferOutputStream()
    write(stream)
    data = stream.getvalue()
    write_bytes(uri, data)
    return data.size, hashlib.sha256(data).hexdigest()
