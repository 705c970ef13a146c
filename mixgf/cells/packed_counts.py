"""Raw counts of cells in few bytes: about two for each count above 0, and little work to write and to read.

A row of a CSR matrix becomes lists of small integers. Columns of a row mostly ascend in small steps, and most counts are
small, so both take one byte each. What does not fit lies in a list of its own:

    steps   uint8: column - column before it (-1 before the first one); 0 = the column is the next one of `far`
    counts  uint8: count; 0 = the count is the next one of `large`
    far     int32: columns whose step is not in 1 to 255
    large   int32: counts above 255

Counts of 0 are left out. All other counts, their columns and their order come back as they were.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.arrays import empty, read_only
from mixgf.jit import jit

BYTES = pa.list_(pa.field("element", pa.uint8(), nullable=False))
INT32S = pa.list_(pa.field("element", pa.int32(), nullable=False))
SCHEMA = pa.schema([("steps", BYTES), ("counts", BYTES), ("far", INT32S), ("large", INT32S)])


def column_type(num_columns: int) -> type[np.uint16 | np.int32]:
    """Smallest type of column numbers."""
    return np.uint16 if num_columns <= 1 << 16 else np.int32


@jit
def _pack(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, steps: np.ndarray, counts: np.ndarray, far: np.ndarray,
    large: np.ndarray, ends: np.ndarray,
) -> None:  # fmt: skip
    """Fill the four lists; `ends` (int32, 3 x rows + 1) gets the offsets of entries, of `far` and of `large`."""
    n, num_far, num_large = 0, 0, 0
    for row in range(indptr.shape[0] - 1):
        before: Any = -1
        for p in range(indptr[row], indptr[row + 1]):
            count: Any = np.int64(data[p])
            column = np.int64(indices[p])
            if count == 0:
                continue
            step: Any = column - before
            if step < 1 or step > 255:
                far[num_far] = column
                num_far += 1
                step = 0
            if count > 255:
                large[num_large] = count
                num_large += 1
                count = 0
            steps[n], counts[n] = step, count
            before = column
            n += 1
        ends[0, row + 1], ends[1, row + 1], ends[2, row + 1] = n, num_far, num_large


@jit
def _unpack(  # noqa: PLR0917 (a compiled kernel)
    steps: np.ndarray, counts: np.ndarray, far: np.ndarray, large: np.ndarray, indptr: np.ndarray,
    out_indices: np.ndarray, out_data: np.ndarray,
) -> None:  # fmt: skip
    next_far, next_large = 0, 0
    for row in range(indptr.shape[0] - 1):
        column: Any = -1
        for p in range(indptr[row] - indptr[0], indptr[row + 1] - indptr[0]):
            if steps[p]:
                column += np.int64(steps[p])
            else:
                column = np.int64(far[next_far])
                next_far += 1
            out_indices[p] = column
            if counts[p]:
                out_data[p] = counts[p]
            else:
                out_data[p] = large[next_large]
                next_large += 1


def pack(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> pa.Table:
    """Packed counts (`SCHEMA`) of CSR rows.

    Args:
        data: counts below 2**31.
        indices: columns below 2**31, of any integer type.
        indptr: int64 row pointers.
    """
    most, num_rows = int(indptr[-1] - indptr[0]), len(indptr) - 1
    steps, counts, far, large = (empty(most, kind) for kind in (np.uint8, np.uint8, np.int32, np.int32))
    ends = np.zeros((3, num_rows + 1), np.int32)
    _pack(read_only(data), read_only(indices), read_only(indptr), steps, counts, far, large, ends)
    entries, nums_far, nums_large = (pa.array(e) for e in ends)
    lists = [
        pa.ListArray.from_arrays(entries, pa.array(steps[: ends[0, -1]]), BYTES),
        pa.ListArray.from_arrays(entries, pa.array(counts[: ends[0, -1]]), BYTES),
        pa.ListArray.from_arrays(nums_far, pa.array(far[: ends[1, -1]]), INT32S),
        pa.ListArray.from_arrays(nums_large, pa.array(large[: ends[2, -1]]), INT32S),
    ]
    return pa.table(lists, schema=SCHEMA)


def unpack(batch: pa.RecordBatch, num_columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR rows of packed counts: int32 counts, columns (uint16 where `num_columns` allows it, else int32), int64 row pointers."""
    steps, counts, far, large = (batch[name].flatten().to_numpy() for name in SCHEMA.names)
    indptr = batch["steps"].offsets.to_numpy().astype(np.int64)
    indices, data = empty(len(steps), column_type(num_columns)), empty(len(steps), np.int32)
    _unpack(steps, counts, far, large, indptr, indices, data)
    return data, indices, indptr - indptr[0]
