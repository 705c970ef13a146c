"""The same cells with other genes: files of one study often differ by a gene filter, so that a hash of all counts differs.

A cell's signature is a MinHash (Broder 1997) of its 64 highest raw counts, as a set of (gene, count) pairs. Gene filters
by number of cells rarely touch these. Two cells of one tissue share about 1 % of the pairs, and the same cell after
`filter_genes` over 95 %. A signature has `BANDS` values of 32 bits, each of `ROWS` minima; cells are the same if
`MATCHES` bands agree. With a share s of common pairs a band agrees with probability s^5: at s = .9, .8 and .7 the
same cell is found in 1.0, .99 and .80 of cases; at .1, a false match has a chance of 1e-8 per pair of cells.

Counts, not sentences, are compared, since a sentence depends on the medians of its corpus.
`jobs/bench.py duplicates` measures both error rates on files of cells.

Letters: N cells, M cells of an evaluation, K bands, G columns of a source.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mixgf.arrays import Bools, Ints, read_only
from mixgf.cells.qc import splitmix64
from mixgf.jit import jit

NUM_GENES = 64
"""Highest counts of a cell that make its signature."""
FEWEST = 32
"""A cell with fewer detected genes has no signature: all its bands are 0."""
BANDS, ROWS = 16, 5
MATCHES = 2
"""Bands that agree in two records of one cell, at least."""
COLUMNS = tuple(f"band_{k:02d}" for k in range(BANDS))
"""Names of the bands in files."""
STORED = {"compression": "none", "use_dictionary": False}
"""How bands are written to Parquet: they are random numbers."""
_GROUP_CELLS = 1 << 22
"""Cells that are sorted at a time, about."""


def _multipliers() -> np.ndarray:
    """Odd uint32 factors (BANDS x ROWS,): each orders the pairs in another way."""
    drawn = np.random.default_rng(64).integers(0, 1 << 32, BANDS * ROWS, dtype=np.uint64)
    return (drawn | np.uint64(1)).astype(np.uint32)


_MULTIPLIERS = _multipliers()


@jit
def _keep_minima(low: np.ndarray, pair: np.uint64, factors: np.ndarray) -> None:
    """Include one pair (its 32-bit hash) in the minima under every order."""
    for k in range(len(factors)):
        low[k] = min(low[k], np.uint32(np.uint32(pair) * factors[k]))


@jit
def _least_count(counts: np.ndarray, columns: np.ndarray, key: np.ndarray, histogram: np.ndarray) -> tuple[int, int]:
    """The least count that is taken, and how many of its cells' genes are above it; counts over 255 are one. 0 = too few genes."""
    histogram[:] = 0
    detected = 0
    for p in range(len(counts)):
        if counts[p] > 0 and key[columns[p]] != 0:
            histogram[min(counts[p], 255)] += 1
            detected += 1
    level, above = 255, 0
    while level > 1 and above + histogram[level] < NUM_GENES:
        above += histogram[level]
        level -= 1
    return (level, above) if detected >= FEWEST else (0, 0)


@jit
def _signatures(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, key: np.ndarray, factors: np.ndarray, out: np.ndarray
) -> None:
    """Fill the bands (N, K) of all rows; zeros stay where a row has too few genes."""
    histogram = np.zeros(256, np.int64)
    ties = np.zeros(len(key), np.uint64)
    low = np.zeros(len(factors), np.uint32)
    rows = len(factors) // out.shape[1]
    for row in range(indptr.shape[0] - 1):
        counts, columns = data[indptr[row] : indptr[row + 1]], indices[indptr[row] : indptr[row + 1]]
        level, above = _least_count(counts, columns, key, histogram)
        if level == 0:
            continue
        low[:] = np.uint32(0xFFFFFFFF)
        num_ties = 0
        for p in range(len(counts)):
            count: Any = np.int64(counts[p])
            if count < level or key[columns[p]] == 0:
                continue
            pair = splitmix64(key[columns[p]] + np.uint64(count) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
            if min(count, 255) > level:
                _keep_minima(low, pair, factors)
            else:  # the largest count first, then by hash: other genes do not change the order
                ties[num_ties] = (np.uint64(0x7FFFFFFF - count) << np.uint64(32)) | pair
                num_ties += 1
        needed = min(NUM_GENES - above, num_ties)
        for one in np.partition(ties[:num_ties], needed - 1)[:needed]:
            _keep_minima(low, one & np.uint64(0xFFFFFFFF), factors)
        for band in range(out.shape[1]):
            h = np.uint64(band)
            for r in range(rows):
                h = splitmix64(h ^ np.uint64(low[band * rows + r]))
            out[row, band] = max(np.uint32(h >> np.uint64(32)), np.uint32(1))


def signatures(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, key_G: np.ndarray) -> np.ndarray:
    """Signatures of the cells of one CSR block, uint32 (N, K); 0 in a cell with fewer than `FEWEST` genes.

    Args:
        data: raw counts.
        indices: columns, of any integer type.
        indptr: row pointers.
        key_G: uint64, hash key of each column's gene; 0 = not compared.
    """
    out = np.zeros((len(indptr) - 1, BANDS), np.uint32)
    _signatures(read_only(data), read_only(indices), read_only(indptr), read_only(key_G), _MULTIPLIERS, out)
    return out


def find(evaluated_MK: np.ndarray, blocks: Iterable[np.ndarray]) -> Bools:
    """Which cells of an evaluation occur in a corpus, bool (M,).

    Args:
        evaluated_MK: signatures of the evaluation.
        blocks: signatures of the corpus, some cells at a time: memory is about 100 bytes for each cell of the largest block
            and each cell of the evaluation.
    """
    own_UK, which_M = np.unique(evaluated_MK, axis=0, return_inverse=True)
    found_U = np.zeros(len(own_UK), dtype=bool)
    order_KU = np.argsort(own_UK.T, axis=1, kind="stable")
    sorted_KU = np.take_along_axis(own_UK.T, order_KU, axis=1)
    for block in blocks:
        theirs_BK = np.unique(block, axis=0)
        pairs: list[np.ndarray] = []
        for theirs_B, order_U, sorted_U in zip(theirs_BK.T, order_KU, sorted_KU, strict=True):
            start_B = np.searchsorted(sorted_U, theirs_B, "left")
            num_B = np.where(theirs_B > 0, np.searchsorted(sorted_U, theirs_B, "right") - start_B, 0)
            hit_B = np.flatnonzero(num_B)
            num = num_B[hit_B]
            within = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
            own = order_U[np.repeat(start_B[hit_B], num) + within]
            pairs.append(own * len(theirs_BK) + np.repeat(hit_B, num))
        pair, times = np.unique(np.concatenate(pairs), return_counts=True)
        found_U[pair[times >= MATCHES] // max(1, len(theirs_BK))] = True
    return found_U[which_M.ravel()]


def pair_equal(value_N: np.ndarray) -> np.ndarray:
    """Pairs of cells that agree in a band: each cell and the next one with its value, uint32 (2, pairs).

    The work grows with N log N; memory beside the arguments is about 40 bytes per cell of `_GROUP_CELLS`.

    Args:
        value_N: values of the band, uint32; 0 = no signature.
    """
    pairs = [np.empty((2, 0), np.uint32)]
    bits = max(0, len(value_N) // _GROUP_CELLS).bit_length()
    for group in range(1 << bits):
        mine = value_N > 0
        if bits:
            mine &= value_N >> np.uint32(32 - bits) == group
        cells = np.flatnonzero(mine)
        cells = cells[np.argsort(value_N[cells], kind="stable")]
        equal = value_N[cells[1:]] == value_N[cells[:-1]]
        pairs.append(np.stack([cells[:-1][equal], cells[1:][equal]]).astype(np.uint32))
    return np.concatenate(pairs, axis=1)


def later_copies(first_P: np.ndarray, later_P: np.ndarray) -> tuple[Ints, Ints]:
    """Cells that equal an earlier cell: their numbers, ascending, and that of the earlier cell, each int64.

    Args:
        first_P: first cells of the pairs of all bands (`pair_equal`).
        later_P: their later cells.
    """
    pair, times = np.unique(later_P.astype(np.int64) << 32 | first_P.astype(np.int64), return_counts=True)
    same = pair[times >= MATCHES]
    later, at = np.unique(same >> 32, return_index=True)
    return later, (same & 0xFFFFFFFF)[at]
