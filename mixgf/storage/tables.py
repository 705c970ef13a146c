"""Tables by URI, written atomically: Parquet with byte count and SHA-256, and Arrow IPC for what is soon read again."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mixgf.storage.files import is_local, local_path, open_arrow, open_read, read_bytes, replacing, write_bytes


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file's table, with the given columns; None = all. All columns are read from object storage in one request."""
    if columns is None and not is_local(uri):
        return pq.read_table(pa.BufferReader(read_bytes(uri, small=True)), use_threads=False)
    with open_read(uri) as file:
        return pq.read_table(file, columns=columns, use_threads=False)


def read_row_groups(uri: str, columns: list[str]) -> Iterator[pa.Table]:
    """Those of the given columns that a Parquet file has, one row group in memory at a time."""
    with open_read(uri) as file:
        parquet = pq.ParquetFile(file)
        there = [name for name in columns if name in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, there, use_threads=False)


class _HashingFile(io.RawIOBase):
    """A file that counts the bytes written to it and computes their SHA-256."""

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

    def write(sink: pa.NativeFile) -> None:
        with pq.ParquetWriter(sink, schema, **({"compression": "zstd"} | options)) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=row_group_size)
                del table  # not held while the next one is made

    if is_local(uri):  # the file is never held in memory as a whole
        with replacing(local_path(uri)) as temporary, temporary.open("wb", buffering=0) as file:
            hashing = _HashingFile(file)
            with pa.PythonFile(hashing, mode="w") as sink:
                write(sink)
            os.fsync(file.fileno())
        return hashing.num_bytes, hashing.digest.hexdigest()
    stream = pa.BufferOutputStream()
    write(stream)
    data = stream.getvalue()
    write_bytes(uri, data)
    return data.size, hashlib.sha256(data).hexdigest()


def write_batches(uri: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema as one Arrow IPC file.

    On local disk it is not compressed, so that it costs little more than a copy in memory. For object storage it is (zstd), and
    is held in memory as a whole.
    """
    options = pa.ipc.IpcWriteOptions(compression=None if is_local(uri) else "zstd", use_threads=False)

    def write(sink: pa.NativeFile) -> None:
        with pa.ipc.new_file(sink, schema, options=options) as writer:
            for table in tables:
                writer.write_table(table)

    if is_local(uri):
        with replacing(local_path(uri)) as temporary, pa.OSFile(str(temporary), "wb") as file:
            write(file)
        return
    stream = pa.BufferOutputStream()
    write(stream)
    write_bytes(uri, stream.getvalue())


def read_batches(uri: str) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow IPC file, one in memory at a time."""
    options = pa.ipc.IpcReadOptions(use_threads=False)
    # not mapped into memory: the pages that were read would count as the worker's
    opened = pa.OSFile(str(local_path(uri))) if is_local(uri) else open_arrow(uri)
    with opened as file, pa.ipc.open_file(file, options=options) as batches:
        for i in range(batches.num_record_batches):
            yield batches.get_batch(i)
