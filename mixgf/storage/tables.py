"""Moved here from mixgf/storage.py."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mixgf.storage.files import _replacing, is_local, local_path, open_read, write_bytes


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
