"""Tables by URI, written atomically: Parquet with byte count and SHA-256, and Arrow IPC for what is soon read again.

What is read is what was written. Pages of Parquet have checksums (CRC-32), which are verified. The footer and the length of a
file are covered by a seal that lies before the footer (`_Seal`), where other readers of Parquet do not look. Parquet without a seal,
of other writers or earlier versions, is read without these checks. Nothing else in mixgf opens Parquet. An Arrow IPC stream is
written in parts, one for each batch, and ends with a CRC-32 of each part.
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
_PART, _END, _CHECKED = struct.Struct("<QI"), struct.Struct("<8sIIQ"), b"mixgfIP2"
"""After an Arrow IPC stream: number of bytes and CRC-32 of each part; then magic, CRC-32 and length of that list, and bytes of the stream."""


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
                _read_parts(uri, file)
        elif uri.endswith(".json"):
            read_json(uri)
    except (UserError, ValueError, OSError):
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
    """A file that computes the CRC-32 of each part of what is written to it."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.crc, self.begin, self.parts = 0, 0, list[tuple[int, int]]()

    def add(self, data: memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)

    def end_part(self) -> None:
        """What is written from now on belongs to another part."""
        self.parts.append((self.num_bytes - self.begin, self.crc))
        self.crc, self.begin = 0, self.num_bytes

    def write_parts(self) -> None:
        """Write the list of parts, and where it begins."""
        listed = b"".join(_PART.pack(*part) for part in self.parts)
        self.file.write(listed + _END.pack(_CHECKED, zlib.crc32(listed), len(listed), self.num_bytes))


def write_batches(uri: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema as one Arrow IPC stream, with a CRC-32 of each batch at its end.

    On local disk it is not compressed, so that it costs little more than a copy in memory. For object storage it is (zstd), and
    is held in memory as a whole.
    """
    options = pa.ipc.IpcWriteOptions(compression=None if is_local(uri) else "zstd", use_threads=False)

    def write(raw: Any) -> None:
        file = _CheckedFile(raw)
        with pa.PythonFile(file, mode="w") as sink:
            with pa.ipc.new_stream(sink, schema, options=options) as writer:
                for table in tables:
                    for batch in table.to_batches():
                        writer.write_batch(batch)
                        file.end_part()
            file.end_part()
        file.write_parts()

    if is_local(uri):
        with replacing(local_path(uri)) as temporary, temporary.open("wb", buffering=0) as raw:
            write(raw)
        return
    stream = io.BytesIO()
    write(stream)
    write_bytes(uri, pa.py_buffer(stream.getbuffer()))


def read_batches(uri: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow IPC stream, one in memory at a time. Each is checked before it is given, and read once.

    Raises:
        UserError: The file, or the next batch, is not what was written.
    """
    # not mapped into memory: the pages that were read would count as the worker's
    stream: BinaryIO = open_read(uri) if is_local(uri) else io.BytesIO(read_bytes(uri))
    with stream, _refusals(uri):
        schema: pa.Schema | None = None
        for size, crc in _read_parts(uri, stream):
            data = stream.read(size)
            if len(data) != size or zlib.crc32(data) != crc:
                raise damaged(uri, "it has other bytes than were written")
            part = pa.BufferReader(data)
            schema = schema or pa.ipc.read_schema(part)
            if (found := _read_batch(part, schema)) is not None:
                yield found


def _read_batch(part: pa.BufferReader, schema: pa.Schema) -> pa.RecordBatch | None:
    """The batch of a part; None in the last one, which has the end of the stream."""
    try:
        return pa.ipc.read_record_batch(pa.ipc.read_message(part), schema)
    except EOFError:
        return None


def _read_parts(uri: str, file: BinaryIO) -> list[tuple[int, int]]:
    """Bytes and CRC-32 of each part of an Arrow IPC stream; the position goes back to the start.

    Raises:
        UserError: The end of the file is not what was written.
    """
    total = file.seek(0, os.SEEK_END)
    file.seek(max(0, total - _END.size))
    end = file.read()
    if len(end) < _END.size or not end.startswith(_CHECKED):
        raise damaged(uri, "cut off, or another file" if total else "empty")
    _, crc, length, num_bytes = _END.unpack(end)
    file.seek(max(0, total - _END.size - length))
    listed = file.read(length)
    file.seek(0)
    if num_bytes + length + _END.size != total or length % _PART.size or zlib.crc32(listed) != crc:
        raise damaged(uri, "it has other bytes than were written")
    return list(_PART.iter_unpack(listed))
