"""Column-major count files (CSC matrices, Matrix Market) rewritten as rows, once.

To read a row range of such a file, the whole file must be scanned, and `prepare` reads many row ranges in three passes.
`write_rows` scans the file once and spills its entries to local disk by chunk of rows (8 to 14 bytes an entry). It then
writes each chunk as a Parquet file of CSR rows, from which `read_rows` reads row ranges.

Memory: `SCAN_ENTRIES` entries of the scan, or the entries of one chunk, whichever is larger.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mixgf.cells.reader import RawBlock, Reader, by_row, cut_rows
from mixgf.storage import files, tables

CHUNK_ROWS = 2_500
"""Rows of a chunk."""


def write_rows(reader: Reader, to: str) -> None:
    """Write all rows of a column-major file (`reader.scan` is not None) as chunks in the folder `to`."""
    assert reader.scan is not None, reader.uri
    num_chunks = -(-reader.num_rows // CHUNK_ROWS)
    with tempfile.TemporaryDirectory(prefix="mixgf-") as name:
        paths = [Path(name) / str(chunk) for chunk in range(num_chunks)]
        entry = np.dtype([("row", np.uint16), ("column", np.int32), ("value", np.float64)])
        for row, column, value in reader.scan():
            entry = np.dtype([("row", np.uint16), ("column", np.int32), ("value", value.dtype)])
            chunk, within = np.divmod(row, CHUNK_ROWS)
            order = np.argsort(chunk.astype(np.uint16) if num_chunks < 1 << 16 else chunk, kind="stable")
            entries = np.empty(len(row), entry)
            entries["row"], entries["column"], entries["value"] = within[order], column[order], value[order]
            present, first = np.unique(chunk[order], return_index=True)
            for b, a, z in zip(present.tolist(), first, np.append(first[1:], len(row)), strict=True):
                with paths[b].open("ab") as file:
                    entries[a:z].tofile(file)
        for b, path in enumerate(paths):
            entries = np.fromfile(path, entry) if path.exists() else np.empty(0, entry)
            num_rows = min(CHUNK_ROWS, reader.num_rows - b * CHUNK_ROWS)
            data, indices, indptr = by_row(entries["row"], entries["column"], entries["value"], num_rows)
            offsets = pa.array(indptr, pa.int64())
            lists = {"indices": pa.array(indices), "data": pa.array(data)}
            table = pa.table({k: pa.LargeListArray.from_arrays(offsets, v) for k, v in lists.items()})
            tables.write_table(_uri(to, b), table, compression_level=1, use_dictionary=False, write_statistics=False)
            path.unlink(missing_ok=True)


def read_rows(at: str, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    """Rows [start, stop) from the chunks in the folder `at`, in blocks of at most `rows` rows."""
    for chunk in range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)):
        table = tables.read_table(_uri(at, chunk)).combine_chunks()
        first = chunk * CHUNK_ROWS
        a, z = max(start, first) - first, min(stop, first + CHUNK_ROWS) - first
        indices, data = (table[name].chunk(0) for name in ("indices", "data"))
        indptr = indices.offsets.to_numpy()[a : z + 1]
        lo, hi = int(indptr[0]), int(indptr[-1])
        columns, values = (x.values[lo:hi].to_numpy().copy() for x in (indices, data))  # blocks may be changed in place
        yield from cut_rows(values, columns, indptr - lo, first + a, rows)


def _uri(folder: str, chunk: int) -> str:
    return files.join(folder, f"{chunk:06d}.parquet")
