"""The only home of file systems: local paths, `s3://` URIs and `resource:` files inside the package.

Every write is atomic: a reader sees the old object, the new one, or none, whatever kills the writer. Locally that is a
temporary file in the same folder and a rename; on object storage one PUT (or one completed multipart upload).
Non-AWS endpoints come from AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mixgf.config import UserError

# most stores that are not AWS refuse the newer default checksums (HTTP 411 on UploadPart)
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

_TEMPORARY = ".writing-"


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


@cache
def _filesystem(protocol: str, pid: int) -> Any:
    # keyed by process: connections do not survive a fork; no cached listings: other workers write too
    try:
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        msg = f"{protocol}:// is not a known storage: use a local path or s3:// ({error})"
        raise UserError(msg) from None


def _remote(uri: str) -> tuple[Any, str]:
    protocol, _, key = uri.partition("://")
    return _filesystem(protocol, os.getpid()), key


def join(uri: str, *parts: str) -> str:
    """The URI of something inside a folder."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    if is_local(uri):
        return local_path(uri).exists()
    fs, key = _remote(uri)
    return bool(fs.exists(key))


def is_folder(uri: str) -> bool:
    """Whether a folder is there, not a file."""
    if is_local(uri):
        return local_path(uri).is_dir()
    fs, key = _remote(uri)
    return bool(fs.isdir(key))


def size(uri: str) -> int:
    """Bytes of a file."""
    if is_local(uri):
        return local_path(uri).stat().st_size
    fs, key = _remote(uri)
    return int(fs.size(key))


def list_dir(uri: str) -> list[str]:
    """Names of what lies directly in a folder, sorted; empty when there is no such folder."""
    if is_local(uri):
        path = local_path(uri)
        return sorted(p.name for p in path.iterdir() if not p.name.startswith(_TEMPORARY)) if path.is_dir() else []
    fs, key = _remote(uri)
    try:
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(key, detail=False))
    except FileNotFoundError:
        return []


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
    fs, key = _remote(uri)
    protocol = uri.partition("://")[0]
    if fs.exists(key):
        return [uri]
    return sorted(f"{protocol}://{found}" for found in fs.glob(key))


def read_bytes(uri: str) -> bytes:
    """The whole of a file."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    fs, key = _remote(uri)
    return cast("bytes", fs.cat_file(key))


def open_read(uri: str, block_size: int = 4 << 20) -> BinaryIO:
    """A seekable binary file; on object storage it reads ranges of `block_size` bytes ahead."""
    if is_local(uri):
        return cast("BinaryIO", local_path(uri).open("rb"))
    fs, key = _remote(uri)
    return cast("BinaryIO", fs.open(key, "rb", block_size=block_size, cache_type="readahead"))


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
    fs, key = _remote(uri)
    fs.pipe_file(key, bytes(data))


def upload(path: Path, uri: str) -> None:
    """Publish one local file atomically."""
    if is_local(uri):
        with _replacing(local_path(uri)) as temporary:
            shutil.copyfile(path, temporary)
        return
    fs, key = _remote(uri)
    fs.put_file(str(path), key)


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
        fs, key = _remote(uri)
        fs.cp_file(key, _remote(to)[1])


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path to a file: the file itself, or a download that is removed afterwards."""
    if is_local(uri):
        yield local_path(uri)
        return
    fs, key = _remote(uri)
    with tempfile.TemporaryDirectory(prefix="mixgf-") as folder:
        path = Path(folder) / key.rsplit("/", 1)[-1]
        fs.get_file(key, str(path))
        yield path


def remove(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing there is fine."""
    if is_local(uri):
        path = local_path(uri)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    fs, key = _remote(uri)
    if fs.exists(key):
        fs.rm(key, recursive=True)


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
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file's table."""
    with open_read(uri) as file:
        return pq.read_table(file, columns=columns, use_threads=False)


def write_table(uri: str, table: pa.Table, **options: Any) -> tuple[int, str]:
    """Write a Parquet file atomically; the same table and options give the same bytes. Returns (bytes, sha256)."""
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, **({"compression": "zstd"} | options))
    data = stream.getvalue()
    write_bytes(uri, data)
    return data.size, hashlib.sha256(data).hexdigest()
