"""Laws of packed counts: all counts above 0 come back in their order, whatever their columns and sizes."""

import numpy as np
import pytest
from scipy import sparse

from mixgf.cells import packed_counts


def back(data, indices, indptr, num_columns):
    (batch,) = packed_counts.pack(data, indices, indptr).combine_chunks().to_batches()
    return packed_counts.unpack(batch, num_columns)


@pytest.mark.parametrize("num_columns", [300, 65_536, 70_000])
def test_counts_columns_and_their_order_come_back(num_columns):
    rng = np.random.default_rng(num_columns)
    counts = sparse.random_array((40, num_columns), density=0.01, format="csr", rng=rng)
    counts.data = rng.choice([1, 2, 254, 255, 256, 2**31 - 1], counts.nnz).astype(np.int32)
    indptr = counts.indptr.astype(np.int64)
    for order in (np.arange(counts.nnz), np.arange(counts.nnz)[::-1]):  # columns that ascend, and that descend
        rows = counts.data[order], counts.indices[order], indptr if order[0] == 0 else counts.nnz - indptr[::-1]
        found = back(*rows, num_columns)
        assert [x.dtype for x in found] == [np.int32, np.uint16 if num_columns <= 65_536 else np.int32, np.int64]
        assert all(np.array_equal(a, b) for a, b in zip(found, rows, strict=True))


def test_counts_of_zero_are_left_out():
    data, indices, indptr = back(np.array([0, 3, 0]), np.array([0, 7, 9]), np.array([0, 2, 2, 3]), 10)
    assert (data.tolist(), indices.tolist(), indptr.tolist()) == ([3], [7], [0, 1, 1, 1])


def test_a_part_of_the_rows_is_unpacked_alone():
    counts = sparse.random_array((9, 5_000), density=0.1, format="csr", rng=np.random.default_rng(1))
    counts.data = np.arange(1, counts.nnz + 1, dtype=np.int32)
    (batch,) = packed_counts.pack(counts.data, counts.indices, counts.indptr).combine_chunks().to_batches()
    data, indices, indptr = packed_counts.unpack(batch.slice(4, 3), 5_000)
    assert (sparse.csr_array((data, indices, indptr), (3, 5_000)) != counts[4:7]).nnz == 0


def test_typical_counts_take_two_bytes_each():
    counts = sparse.random_array((200, 20_000), density=0.09, format="csr", rng=np.random.default_rng(2))
    counts.data = np.ones(counts.nnz, np.int32)
    table = packed_counts.pack(counts.data, counts.indices, counts.indptr)
    assert table.nbytes < 2.05 * counts.nnz
