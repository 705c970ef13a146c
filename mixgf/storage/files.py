"""Files by URI: local paths, `s3://` URIs and `resource:` files inside the package.

Every write is atomic: a reader sees the old file, the new one, or none, even if the writer is killed. Local files are written
beside their place and renamed. On object storage a write is one PUT, or from 100 MB one multipart upload.

Requests to object storage are repeated after transient errors (`mixgf.storage.retry`). What still fails is a `StorageError`,
which readers can tell from the error of a damaged file.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa

from mixgf.config import parse
from mixgf.errors import AccessError
from mixgf.redact import redact
from mixgf.storage.retry import error_code
from mixgf.storage.s3 import (
    BUFFER_BYTES,
    RangeFile,
    async_filesystem,
    filesystem_and_key,
    listed_sizes,
    range_reader,
    read_whole,
    request,
    require_length,
)

T = TypeVar("T")
R = TypeVar("R")
# most other stores than AWS reject the newer default checksums (HTTP 411 on UploadPart)
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
# every request: 4 attempts, with at most 7 s of pauses
os.environ.setdefault("AWS_RETRY_MODE", "standard")
os.environ.setdefault("AWS_MAX_ATTEMPTS", "4")
PART_BYTES = 50 << 20
"""Size of a part of a multipart upload; files of twice this size and more are uploaded in parts."""
REMOTE_READS = 32
"""Small files of object storage read at a time."""
_TEMPORARY = ".writing-"
_REMOVALS = 5
"""Attempts to remove a local folder into which another process writes."""


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


def join(uri: str, *parts: str) -> str:
    """The URI of something inside a folder."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(uri):
        return local_path(uri).exists()
    return request(uri, lambda fs, key: bool(fs.exists(key)))


def is_folder(uri: str) -> bool:
    """Whether a folder is there, not a file."""
    if is_local(uri):
        return local_path(uri).is_dir()
    return request(uri, lambda fs, key: bool(fs.isdir(key)))


def is_same(uri: str, other: str) -> bool:
    """Whether two URIs name one file that is there, however they are spelled; true for links on local disk, too."""
    if is_local(uri) and is_local(other):
        one, two = local_path(uri), local_path(other)
        return one.exists() and two.exists() and one.samefile(two)
    return uri.rstrip("/") == other.rstrip("/")


def size(uri: str) -> int:
    """Bytes of a file."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    return request(uri, lambda fs, key: int(fs.size(key)))


def sizes(uris: Sequence[str]) -> list[int]:
    """Bytes of each file; -1 where there is none. Files of one folder in s3:// are listed, not asked for one by one."""
    folders: dict[str, set[str]] = {}
    for uri in uris:
        if uri.startswith("s3://"):
            folder, _, name = uri.rpartition("/")
            folders.setdefault(folder, set()).add(name)
    found: dict[str, int] = {}
    for folder, names in folders.items():
        if len(names) > 1:
            with suppress(FileNotFoundError, AccessError):  # some keys may read files, but list none
                found |= {join(folder, name): size for name, size in listed_sizes(folder, names).items()}
    rest = [uri for uri in uris if uri not in found]
    remote = next((uri for uri in rest if not is_local(uri)), "")
    found |= zip(rest, map_reads(remote, _size, rest), strict=True)
    return [found[uri] for uri in uris]


def _size(uri: str) -> int:
    try:
        return size(uri)
    except (FileNotFoundError, NotADirectoryError):
        return -1


def list_dir(uri: str) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; empty if there is no such folder."""
    if is_local(uri):
        path = local_path(uri)
        try:
            return sorted(p.name for p in path.iterdir() if not p.name.startswith(_TEMPORARY))
        except (FileNotFoundError, NotADirectoryError):
            return []
    try:
        found = request(uri, lambda fs, key: fs.ls(key, detail=False))
    except FileNotFoundError:
        return []
    itself = uri.partition("://")[2].rstrip(
        "/"
    )  # the folder itself may be listed: some tools make an empty object of it
    return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in found if str(name).rstrip("/") != itself)


def find(uri: str) -> dict[str, int]:
    """URIs and bytes of all files in a folder and its folders, sorted; empty if there is no such folder.

    Other processes may write or delete there.
    """
    if is_local(uri):
        root, found = local_path(uri), {}
        for folder, _, names in os.walk(root):
            for path in (Path(folder, name) for name in names if not name.startswith(_TEMPORARY)):
                with suppress(FileNotFoundError):  # deleted by another process since it was listed
                    if stat.S_ISREG((facts := path.stat()).st_mode):
                        found[path.relative_to(root)] = facts.st_size
        return {join(uri, path.as_posix()): found[path] for path in sorted(found)}
    protocol, _, itself = uri.rstrip("/").partition("://")
    try:
        facts = request(uri, lambda fs, key: fs.find(key, detail=True))
    except FileNotFoundError:  # no such bucket
        return {}
    return {f"{protocol}://{name}": int(facts[name]["size"]) for name in sorted(facts) if name.rstrip("/") != itself}


def names_in(uri: str) -> list[str]:
    """Names of all files in a folder and its folders, relative to it."""
    return [found.removeprefix(uri.rstrip("/")).lstrip("/") for found in find(uri)]


def stamps(uris: Iterable[str]) -> dict[str, str]:
    """A text for each file that is another one after the file was written again: bytes and time of change, or the ETag."""
    found = {}
    for uri in uris:
        if is_local(uri):
            facts = local_path(uri).stat()
            found[uri] = f"{facts.st_size}-{facts.st_mtime_ns}"
        else:
            remote = request(uri, lambda fs, key: fs.info(key))
            found[uri] = f"{remote['size']}-{str(remote.get('ETag', '')).strip(chr(34))}"
    return found


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
    return sorted(f"{protocol}://{found}" for found in request(uri, lambda fs, key: fs.glob(key)))


def read_bytes(uri: str) -> bytes:
    """The whole of a file."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    if uri.startswith("s3://"):
        return read_whole(uri)
    return request(uri, _read_whole)


def _read_whole(fs: Any, key: str) -> bytes:
    data = cast("bytes", fs.cat_file(key))
    require_length(len(data), int(fs.size(key)))
    return data


def open_read(uri: str, block_size: int = 4 << 20) -> BinaryIO:
    """A seekable binary file; on object storage it reads ranges, up to `block_size` bytes ahead."""
    if is_local(uri):
        return cast("BinaryIO", local_path(uri).open("rb"))
    facts = request(uri, lambda fs, key: fs.info(key))
    if facts["type"] != "file":
        raise FileNotFoundError(uri)
    return io.BufferedReader(
        RangeFile(uri, range_reader(uri, facts.get("ETag", "")), int(facts["size"]), block_size), BUFFER_BYTES
    )


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
def zarr_store(uri: str) -> Iterator[Any]:
    """A Zarr store for reading: a folder on local disk or object storage, or a local .zip. Needs the package zarr."""
    from zarr import storage  # noqa: PLC0415 (an extra)

    if not is_local(uri):
        yield storage.FsspecStore(async_filesystem(uri), read_only=True, path=uri.partition("://")[2].rstrip("/"))
    elif uri.endswith(".zip"):
        with storage.ZipStore(local_path(uri), read_only=True) as store:
            yield store
    else:
        yield storage.LocalStore(local_path(uri), read_only=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it on success and is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    with _naming(path, temporary):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Errors of the system name the file that was to be written: those of a full disk name none, others the temporary file."""
    try:
        yield
    except OSError as error:
        named = {error.filename, error.filename2} - {None}
        if error.errno is not None and (not named or str(temporary) in named):
            error.filename, error.filename2 = str(path), None
        raise


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file atomically."""
    if is_local(uri):
        with replacing(local_path(uri)) as temporary, temporary.open("wb") as file:
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
        request(uri, call)
    except FileNotFoundError as error:
        msg = f"{uri}: cannot be written ({error}); make the bucket first"
        raise AccessError(msg) from None


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a file that does not exist yet; of several writers at once, one succeeds.

    On object storage the request has the condition `If-None-Match: *`. Some stores ignore it, and the answer to a PUT can be lost,
    so the file is read back and compared.

    Args:
        uri: Of the file.
        data: Its content, different for every writer (with a time or a name).

    Returns:
        Whether the file has this content; False if another writer's file is there.
    """
    if is_local(uri):
        path = local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            with _naming(path, temporary):
                temporary.write_bytes(data)
                os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True
    with suppress(FileExistsError):
        _put(uri, _create_request(data))
    return read_bytes(uri) == data


def _create_request(data: bytes) -> Callable[[Any, str], None]:
    def call(fs: Any, key: str) -> None:
        try:
            fs.pipe_file(key, data, mode="create")
        except OSError as error:
            if error_code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise FileExistsError(str(error)) from None
            if error_code(error) not in ("NotImplemented", "501"):
                raise
            fs.pipe_file(key, data)

    return call


def upload(path: Path, uri: str) -> None:
    """Publish one local file atomically."""
    if is_local(uri):
        with replacing(local_path(uri)) as temporary:
            shutil.copyfile(path, temporary)
        return
    _put(uri, lambda fs, key: fs.put_file(str(path), key, chunksize=_part_bytes(path.stat().st_size)))


def copy(uri: str, to: str) -> None:
    """Copy one file atomically: a hard link on one disk, a copy by the server within object storage."""
    if is_local(uri) and is_local(to):
        with replacing(local_path(to)) as temporary:
            try:
                temporary.hardlink_to(local_path(uri))
            except OSError:  # another disk, or a file system without hard links
                shutil.copyfile(local_path(uri), temporary)
    elif is_local(uri):
        upload(local_path(uri), to)
    elif is_local(to) or uri.partition("://")[0] != to.partition("://")[0]:
        with local_copy(uri) as path:
            upload(path, to)
    else:
        request(uri, lambda fs, key: fs.cp_file(key, filesystem_and_key(to)[1]))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path to a file: the file itself, or a download that is removed afterwards."""
    if is_local(uri):
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="mixgf-") as folder:
        path = Path(folder) / uri.rsplit("/", 1)[-1]
        request(uri, lambda fs, key: _download(fs, key, path))
        yield path


def _download(fs: Any, key: str, path: Path) -> None:
    fs.get_file(key, str(path))
    require_length(path.stat().st_size, int(fs.size(key)))


def remove(uri: str) -> None:
    """Delete a file, or a folder with its content. A missing file is no error; other processes may write or delete there."""
    if is_local(uri):
        path = local_path(uri)
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        for attempt in range(_REMOVALS):
            try:
                shutil.rmtree(path, onerror=_ignore_missing)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or attempt == _REMOVALS - 1:
                    raise
            else:
                return
        return
    if exists(uri):
        request(uri, lambda fs, key: fs.rm(key, recursive=True))


def remove_matching(uri: str, pattern: re.Pattern[str], *, last: str = "") -> list[str]:
    """Delete the files of a folder whose names, relative to it, match a pattern, and folders that are then empty.

    Args:
        uri: The folder; it may be missing.
        pattern: Must match the whole name.
        last: Name of the file that is deleted after all others.

    Returns:
        Names of the files that are left.
    """
    names = names_in(uri)
    mine = sorted((name for name in names if pattern.fullmatch(name)), key=lambda name: (name == last, name))
    if is_local(uri):
        for name in mine:
            remove(join(uri, name))
        _remove_empty(local_path(uri))
    else:
        for names_at_once in ([name for name in mine if name != last], [name for name in mine if name == last]):
            if names_at_once:
                request(uri.rstrip("/"), partial(_remove_keys, names=names_at_once))
    return sorted(set(names) - set(mine))


def _remove_keys(fs: Any, key: str, *, names: list[str]) -> None:
    fs.rm([f"{key}/{name}" for name in names])


def _remove_empty(folder: Path) -> None:
    """Delete a folder's abandoned temporary files, its empty folders, and the folder itself where nothing is left in it."""
    with suppress(FileNotFoundError):  # another process may delete it meanwhile
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                _remove_empty(path)
            elif path.name.startswith(_TEMPORARY):
                path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or gone
        folder.rmdir()


def map_reads(uri: str, read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results of `read` for each item, in order.

    Where `uri` is in object storage, `REMOTE_READS` items are read at a time, in threads: most of the time of a small read
    is waiting. So that many results are held at most.
    """
    if is_local(uri):
        yield from map(read, items)
        return
    with ThreadPoolExecutor(REMOTE_READS) as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(read, item))
                if len(ahead) == REMOTE_READS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


def _ignore_missing(_: object, __: object, error: tuple[Any, Any, Any]) -> None:
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
    return parse.read_json(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file atomically, with sorted keys."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes; without secrets."""
    return (redact(json.dumps(value, indent=1, sort_keys=True, allow_nan=False)) + "\n").encode()
