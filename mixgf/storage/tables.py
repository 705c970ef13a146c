"""Tables by URI, written atomically: Parquet with byte count and SHA-256, and Arrow IPC for what is soon read again.

What is read is what was written. Pages of Parquet have checksums (CRC-32), which are verified. The footer and the length of a
file are covered by a seal that lies before the footer (`_Seal`), where other readers of Parquet do not look. An Arrow IPC file ends
with a CRC-32 of all of it. Files without seal or checksum, of other writers or earlier versions, are read without these checks.
Nothing else in mixgf opens Parquet.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mixgf.errors import StorageError, UserError
from mixgf.storage.damage import damaged
from mixgf.storage.files import (
    is_local,
    local_path,
    open_read,
    read_bytes,
    read_json,
    replacing,
    write_bytes,
)
from mixgf.storage.files import sha256 as file_sha256

_MAGIC, _PARQUET = b"mixgfPQ1", b"PAR1"
_TAIL_BYTES = 64 << 10
"""Read at once from the end of a Parquet file: footer and seal of most files."""
_CHECKSUM, _CHECKED = struct.Struct("<8sIQ"), b"mixgfIP1"
"""End of an Arrow IPC file: magic, CRC-32 of the bytes before, and their number."""


@dataclass(frozen=True, slots=True)
class _Seal:
    """What lies between the pages and the footer of a Parquet file."""

    num_bytes: int
    """Of the file before the seal."""
    pages: bytes
    """SHA-256 of these bytes. Not checked when a table is read: its pages have checksums of their own."""
    footer: bytes
    """SHA-256 of all bytes after the seal."""

    FORM = struct.Struct("<8sQ32s32s")

    def pack(self) -> bytes:
        return self.FORM.pack(_MAGIC, self.num_bytes, self.pages, self.footer)


def read_table(uri: str, columns: list[str] | None = None, *, sha256: str = "") -> pa.Table:
    """A Parquet file's table. All columns are read from object storage in one request.

    Args:
        uri: Of the file.
        columns: To read; None = all.
        sha256: Of the whole file, which is then read and compared.

    Raises:
        UserError: The file is not what was written.
    """
    if sha256 or (columns is None and not is_local(uri)):
        data = read_bytes(uri)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise damaged(uri, "it has other bytes than were written")
        with _refusals(uri):
            _check_seal(uri, io.BytesIO(data))
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            return file.read(columns, use_threads=False)
    with open_parquet(uri) as file:
        return file.read(columns, use_threads=False)


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file, opened for reading after a check of its seal. Errors of pages that are read are a `UserError` (`_refusals`).

    Raises:
        UserError: The footer or the length is not what was written, or the file is no Parquet.
    """
    with open_read(uri) as stream:
        with _refusals(uri):
            _check_seal(uri, stream)
            file = pq.ParquetFile(stream, page_checksum_verification=True)
        with _refusals(uri):
            yield file


def read_schema(uri: str) -> pa.Schema:
    """The schema of a Parquet file, with its metadata."""
    with open_parquet(uri) as file:
        return file.schema_arrow


@contextmanager
def _refusals(uri: str) -> Iterator[None]:
    """Errors of the content of a file as one line."""
    try:
        yield
    except (UserError, StorageError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        first = str(error).strip().split("\n", maxsplit=1)[0][:200]
        raise damaged(uri, first or type(error).__name__) from None


def _check_seal(uri: str, file: BinaryIO) -> None:
    """Raise a `UserError` if footer or length of a sealed file are not what was written; the position goes back to the start."""
    total = file.seek(0, os.SEEK_END)
    file.seek(max(0, total - _TAIL_BYTES))
    tail = file.read()
    if total < 12 or tail[-4:] != _PARQUET:
        raise damaged(
            uri,
            "empty" if not total else f"{total:,} bytes without the end of a Parquet file: cut off, or another file",
        )
    footer = int.from_bytes(tail[-8:-4], "little") + 8
    need = footer + _Seal.FORM.size
    if need > len(tail) and need <= total:
        file.seek(total - need)
        tail = file.read()
    file.seek(0)
    if need > total:
        return  # of another writer, or no Parquet, which pyarrow says
    magic, num_bytes, _, digest = _Seal.FORM.unpack(tail[-need : len(tail) - footer])
    if magic != _MAGIC:
        return
    if num_bytes != total - need or hashlib.sha256(tail[-footer:]).digest() != digest:
        raise damaged(uri, "its footer is not the one that was written")


def is_whole(uri: str) -> bool:
    """Whether a local file has the beginning, length and end that it was written with; its pages are not read.

    True for remote files, which appear whole or not at all, and for files of other kinds.
    """
    if not is_local(uri):
        return True
    try:
        if uri.endswith(".parquet"):
            with open_read(uri) as file:
                _check_seal(uri, file)
        elif uri.endswith(".arrow"):
            with open_read(uri) as file:
                total = file.seek(0, os.SEEK_END)
                file.seek(max(0, total - _CHECKSUM.size))
                return _CHECKED in (end := file.read()) and _CHECKSUM.unpack(end)[2] == total - _CHECKSUM.size
        elif uri.endswith(".json"):
            read_json(uri)
    except (ValueError, OSError):
        return False
    return True


def read_row_groups(uri: str, columns: list[str], *, sha256: str = "") -> Iterator[pa.Table]:
    """Those of the given columns that a Parquet file has, one row group in memory at a time.

    Args:
        uri: Of the file.
        columns: To read.
        sha256: Of the whole file, which is read and compared before.
    """
    if sha256 and file_sha256(uri) != sha256:
        raise damaged(uri, "it has other bytes than were written")
    with open_parquet(uri) as parquet:
        there = [name for name in columns if name in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, there, use_threads=False)


class _CountingFile(io.RawIOBase):
    """A file that counts the bytes written to it, and computes a checksum of them (`add`)."""

    def __init__(self, file: Any) -> None:
        self.file, self.num_bytes = file, 0

    def add(self, data: memoryview) -> None:
        """Add bytes to the checksum."""
        raise NotImplementedError

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        whole = len(left)
        self.add(left)
        self.num_bytes += whole
        while len(left):
            left = left[self.file.write(left) :]
        return whole


class _HashingFile(_CountingFile):
    """A file that computes the SHA-256 of the bytes written to it. What is written after `hold` waits for `seal`."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.digest = hashlib.sha256()
        self.held: list[bytes] | None = None

    def add(self, data: memoryview) -> None:
        self.digest.update(data)

    def tell(self) -> int:
        return self.num_bytes + sum(map(len, self.held or ()))

    def write(self, data: Any) -> int:
        if self.held is None:
            return super().write(data)
        self.held.append(bytes(data))
        return len(self.held[-1])

    def hold(self) -> None:
        """Keep what is written from now on: the footer."""
        self.held = []

    def seal(self) -> None:
        """Write the seal, then what was held."""
        assert self.held is not None
        footer, self.held = b"".join(self.held), None
        self.write(_Seal(self.num_bytes, self.digest.digest(), hashlib.sha256(footer).digest()).pack())
        self.write(footer)


def write_table(uri: str, table: pa.Table, **options: Any) -> tuple[int, str]:
    """Write a Parquet file atomically; returns its bytes and SHA-256. The same table and options give the same file."""
    return write_tables(uri, table.schema, [table], **options)


def write_tables(
    uri: str, schema: pa.Schema, tables: Iterable[pa.Table], *, row_group_size: int | None = None, **options: Any
) -> tuple[int, str]:
    """Write several tables of one schema as one Parquet file, each in its own row groups.

    Args:
        uri: Of the file.
        schema: Of all tables.
        tables: One is held in memory at a time; for object storage, the whole file is.
        row_group_size: Most rows of a row group.
        options: Of pyarrow's `ParquetWriter`; zstd compression if not given.

    Returns:
        Bytes and SHA-256 (hex) of the file.
    """

    def write(file: _HashingFile) -> None:
        settings = {"compression": "zstd", "write_page_checksum": True} | options
        with pa.PythonFile(file, mode="w") as sink, pq.ParquetWriter(sink, schema, **settings) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=row_group_size)
                del table  # not held while the next one is made
            file.hold()
            writer.close()
        file.seal()

    if is_local(uri):  # the file is never held in memory as a whole
        with replacing(local_path(uri)) as temporary, temporary.open("wb", buffering=0) as raw:
            hashing = _HashingFile(raw)
            write(hashing)
            os.fsync(raw.fileno())
        return hashing.num_bytes, hashing.digest.hexdigest()
    stream = io.BytesIO()
    hashing = _HashingFile(stream)
    write(hashing)
    write_bytes(uri, pa.py_buffer(stream.getbuffer()))
    return hashing.num_bytes, hashing.digest.hexdigest()


class _CheckedFile(_CountingFile):
    """A file that computes the CRC-32 of what is written to it."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.crc = 0

    def add(self, data: memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)


def write_batches(uri: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema as one Arrow IPC file, with a CRC-32 at its end.

    On local disk it is not compressed, so that it costs little more than a copy in memory. For object storage it is (zstd), and
    is held in memory as a whole.
    """
    options = pa.ipc.IpcWriteOptions(compression=None if is_local(uri) else "zstd", use_threads=False)

    def write(raw: Any) -> None:
        file = _CheckedFile(raw)
        with pa.PythonFile(file, mode="w") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
            for table in tables:
                writer.write_table(table)
        raw.write(_CHECKSUM.pack(_CHECKED, file.crc, file.num_bytes))

    if is_local(uri):
        with replacing(local_path(uri)) as temporary, temporary.open("wb", buffering=0) as raw:
            write(raw)
        return
    stream = io.BytesIO()
    write(stream)
    write_bytes(uri, pa.py_buffer(stream.getbuffer()))


def read_batches(uri: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow IPC file, one in memory at a time.

    Raises:
        UserError: The file is not what was written.
    """
    options = pa.ipc.IpcReadOptions(use_threads=False)
    # not mapped into memory: the pages that were read would count as the worker's
    stream: BinaryIO = open_read(uri) if is_local(uri) else io.BytesIO(read_bytes(uri))
    with stream, _refusals(uri):
        end = _checked_bytes(uri, stream)
        batches = pa.ipc.open_file(stream, end, options=options)
        for i in range(batches.num_record_batches):
            yield batches.get_batch(i)


def _checked_bytes(uri: str, file: BinaryIO) -> int:
    """Bytes of an Arrow IPC file without its checksum, which is verified; the position goes back to the start."""
    total = file.seek(0, os.SEEK_END)
    file.seek(max(0, total - _CHECKSUM.size))
    end = file.read()
    if not end.startswith(_CHECKED) or len(end) < _CHECKSUM.size:
        if not end.endswith(b"ARROW1"):
            raise damaged(uri, "cut off, or another file" if total else "empty")
        file.seek(0)
        return total
    _, crc, num_bytes = _CHECKSUM.unpack(end)
    file.seek(0)
    found, left = 0, total - _CHECKSUM.size
    while left and (chunk := file.read(min(left, 1 << 20))):
        found, left = zlib.crc32(chunk, found), left - len(chunk)
    if num_bytes != total - _CHECKSUM.size or found != crc:
        raise damaged(uri, "it has other bytes than were written")
    file.seek(0)
    return int(num_bytes)
