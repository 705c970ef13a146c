"""Column-major count files turned into rows, once: CSC matrices and Matrix Market files.

A row range of such a file can only be had by a scan of all of it, and a corpus is made of many row ranges in three passes.
So the file is scanned once, its entries are spilled to local disk by band of rows (8 to 14 bytes each), and every band is
written as one Parquet file of CSR rows, from which row ranges are read like those of any other file.

Memory: one chunk of the scan, or the entries of one band, whichever is larger.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mixgf.cells.reader import RawBlock, Reader, by_row, cut_rows
from mixgf.storage import files, tables

BAND_ROWS = 2_500


def write(reader: Reader, to: str) -> None:
    """Write all rows of a column-major file (`reader.scan` is not None) as bands under the folder `to`."""
    assert reader.scan is not None, reader.uri
    num_bands = -(-reader.num_rows // BAND_ROWS)
    with tempfile.TemporaryDirectory(prefix="mixgf-") as name:
        paths = [Path(name) / str(band) for band in range(num_bands)]
        entry = np.dtype([("row", np.uint16), ("column", np.int32), ("value", np.float64)])
        for row, column, value in reader.scan():
            entry = np.dtype([("row", np.uint16), ("column", np.int32), ("value", value.dtype)])
            band, within = np.divmod(row, BAND_ROWS)
            order = np.argsort(band.astype(np.uint16) if num_bands < 1 << 16 else band, kind="stable")
            entries = np.empty(len(row), entry)
            entries["row"], entries["column"], entries["value"] = within[order], column[order], value[order]
            present, first = np.unique(band[order], return_index=True)
            for b, a, z in zip(present.tolist(), first, np.append(first[1:], len(row)), strict=True):
                with paths[b].open("ab") as file:
                    entries[a:z].tofile(file)
        for b, path in enumerate(paths):
            entries = np.fromfile(path, entry) if path.exists() else np.empty(0, entry)
            num_rows = min(BAND_ROWS, reader.num_rows - b * BAND_ROWS)
            data, indices, indptr = by_row(entries["row"], entries["column"], entries["value"], num_rows)
            offsets = pa.array(indptr, pa.int64())
            lists = {"indices": pa.array(indices), "data": pa.array(data)}
            table = pa.table({k: pa.LargeListArray.from_arrays(offsets, v) for k, v in lists.items()})
            tables.write_table(_uri(to, b), table, compression_level=1, use_dictionary=False, write_statistics=False)
            path.unlink(missing_ok=True)


def read(at: str, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    """Rows [start, stop) of the bands under the folder `at`, as blocks of at most so many rows."""
    for band in range(start // BAND_ROWS, -(-stop // BAND_ROWS)):
        table = tables.read_table(_uri(at, band)).combine_chunks()
        first = band * BAND_ROWS
        a, z = max(start, first) - first, min(stop, first + BAND_ROWS) - first
        indices, data = (table[name].chunk(0) for name in ("indices", "data"))
        indptr = indices.offsets.to_numpy()[a : z + 1]
        lo, hi = int(indptr[0]), int(indptr[-1])
        columns, values = (x.values[lo:hi].to_numpy().copy() for x in (indices, data))  # blocks may be changed in place
        yield from cut_rows(values, columns, indptr - lo, first + a, rows)


def _uri(folder: str, band: int) -> str:
    return files.join(folder, f"{band:06d}.parquet")
