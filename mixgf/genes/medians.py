"""Median of each gene over all cells of a corpus, from mergeable histograms (sketches).

The median is that of count / depth * 10,000 over the kept cells of the species in which the gene is detected. Rank value
encoding divides by it (paper section 3.2). A histogram has 256 buckets per power of two; values are taken as evenly
spread within a bucket. The relative error is at most 1/256 = 0.39 %.

Bucket counts are whole numbers, and buckets are found from the bits of the float64. So the result depends neither on the
order or partition of the cells nor on the processor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mixgf.jit import jit

SKETCH_BITS = 8
_LOWEST = 1023 - 20  # the exponent field of 2**-20: count 1 in a cell of 10**10 counts
_OCTAVES = 36  # up to 2**16, above the largest value, 10,000
NUM_BUCKETS = _OCTAVES << SKETCH_BITS
RELATIVE_ERROR = 2.0**-SKETCH_BITS
_SMALL = 33
"""Buckets of counts below this are computed once per cell."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """A sparse histogram: key = gene * NUM_BUCKETS + bucket, ascending; both uint32."""

    keys: np.ndarray
    counts: np.ndarray


EMPTY = Sketch(np.empty(0, np.uint32), np.empty(0, np.uint32))


@jit
def _bucket(count: int, depth: float, room: np.ndarray) -> int:
    """Bucket of count / depth * 10,000; `room` is workspace of one float64, whose bits are read."""
    room[0] = count / depth * 10000.0
    return min(max((room.view(np.int64)[0] >> (52 - 8)) - (1003 << 8), 0), 9215)


@jit
def _count(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, depth: np.ndarray, keep: np.ndarray, gene: np.ndarray,
    lowest: int, counts: np.ndarray,
) -> None:  # fmt: skip
    """Add the kept rows to the histogram `counts` (buckets from `lowest` on, genes).

    Most counts of a cell are 1 or 2; with genes as columns they fall into neighbouring memory of two rows.
    """
    room, small = np.empty(1), np.zeros(_SMALL, np.int64)
    for row in range(indptr.shape[0] - 1):
        if not keep[row]:
            continue
        for count in range(1, _SMALL):
            small[count] = _bucket(count, depth[row], room) - lowest
        for p in range(indptr[row], indptr[row + 1]):
            g, count = gene[indices[p]], data[p]
            if g >= 0 and count > 0:
                bucket = small[count] if count < _SMALL else _bucket(count, depth[row], room) - lowest
                counts[bucket, g] += np.uint16(1)


@jit
def _collect(counts: np.ndarray, lowest: int, stop_G: np.ndarray, out_keys: np.ndarray, out_counts: np.ndarray) -> None:
    """Move a histogram to ascending keys and their counts, and set it to 0; `stop_G` is the first position of each gene."""
    for bucket in range(counts.shape[0]):
        row = counts[bucket]
        for g in range(row.shape[0]):
            if row[g]:
                n = stop_G[g]
                out_keys[n], out_counts[n] = g * 9216 + lowest + bucket, row[g]
                stop_G[g], row[g] = n + 1, 0


@jit
def _count_filled(counts: np.ndarray, number_G: np.ndarray) -> None:
    """Add every gene's number of filled buckets to `number_G`."""
    for bucket in range(counts.shape[0]):
        row = counts[bucket]
        for g in range(row.shape[0]):
            number_G[g] += row[g] != 0


@jit
def _merge_sorted(  # noqa: PLR0917 (a compiled kernel)
    keys_a: np.ndarray, counts_a: np.ndarray, keys_b: np.ndarray, counts_b: np.ndarray, keys: np.ndarray,
    counts: np.ndarray,
) -> int:  # fmt: skip
    i, j, n = 0, 0, 0
    while i < keys_a.shape[0] or j < keys_b.shape[0]:
        if j >= keys_b.shape[0] or (i < keys_a.shape[0] and keys_a[i] < keys_b[j]):
            keys[n], counts[n] = keys_a[i], counts_a[i]
            i += 1
        elif i >= keys_a.shape[0] or keys_b[j] < keys_a[i]:
            keys[n], counts[n] = keys_b[j], counts_b[j]
            j += 1
        else:
            keys[n], counts[n] = keys_a[i], counts_a[i] + counts_b[j]
            i += 1
            j += 1
        n += 1
    return n


class SketchBuilder:
    """Builds the sketch of cells, block by block.

    Memory: the sketch, and 2 bytes for every gene and bucket. Buckets range from the least possible value (one count in
    the deepest cell) to 10,000.
    """

    def __init__(self, num_genes: int, most_depth: int, *, most_cells: int = np.iinfo(np.uint16).max) -> None:
        """Start with no cells.

        Args:
            num_genes: genes.
            most_depth: largest depth of a kept cell.
            most_cells: cells that are counted in 16 bits before the counts move to the sketch.
        """
        assert (SKETCH_BITS, _LOWEST, NUM_BUCKETS) == (8, 1003, 9216), "compiled into the kernels above"
        assert num_genes * NUM_BUCKETS < 1 << 32, num_genes
        assert 0 < most_cells <= np.iinfo(np.uint16).max, most_cells
        room = np.empty(1)
        self._lowest = _bucket(1, float(max(most_depth, 1)), room)
        self._counts = np.zeros((_bucket(1, 1.0, room) + 1 - self._lowest, num_genes), np.uint16)
        self._cells, self._most_cells = 0, most_cells
        self._total = EMPTY

    def update(
        self,
        data: np.ndarray,
        indices: np.ndarray,
        indptr: np.ndarray,
        *,
        depth_N: np.ndarray,
        keep_N: np.ndarray,
        gene_G: np.ndarray,
    ) -> None:
        """Add the kept rows of one CSR block.

        Args:
            data: counts.
            indices: columns.
            indptr: row pointers.
            depth_N: depth of each row.
            keep_N: bool, rows to add.
            gene_G: number of the gene of each column, -1 = none; no gene twice.
        """
        depth = depth_N.astype(np.float64)
        first = 0
        while first < len(depth):
            if self._cells == self._most_cells:
                self._flush()
            stop = min(first + self._most_cells - self._cells, len(depth))
            rows, ends = slice(first, stop), slice(first, stop + 1)
            _count(data, indices, indptr[ends], depth[rows], keep_N[rows], gene_G, self._lowest, self._counts)
            self._cells, first = self._cells + stop - first, stop

    def _flush(self) -> None:
        number_G = np.zeros(self._counts.shape[1], np.int32)
        _count_filled(self._counts, number_G)
        stop_G = np.cumsum(number_G, dtype=np.int64)
        n = int(stop_G[-1])
        found = Sketch(np.empty(n, np.uint32), np.empty(n, np.uint32))
        _collect(self._counts, self._lowest, stop_G - number_G, found.keys, found.counts)
        self._total, self._cells = merge_sketches([self._total, found]), 0

    def finish(self) -> Sketch:
        """Sketch of all cells so far."""
        self._flush()
        return self._total


def _cut(keys: np.ndarray, counts: np.ndarray, n: int) -> Sketch:
    """Sketch of the first n entries; the arrays are resized in place, not copied."""
    keys.resize(n, refcheck=False)
    counts.resize(n, refcheck=False)
    return Sketch(keys, counts)


def merge_sketches(sketches: Iterable[Sketch]) -> Sketch:
    """Sketch of the cells of all sketches; neither order nor grouping changes it."""
    total = EMPTY
    for sketch in sketches:
        if not len(total.keys):
            total = sketch
            continue
        most = len(total.keys) + len(sketch.keys)
        keys, counts = np.empty(most, np.uint32), np.empty(most, np.uint32)
        total = _cut(keys, counts, _merge_sorted(total.keys, total.counts, sketch.keys, sketch.counts, keys, counts))
    return total


def median_by_gene(sketch: Sketch) -> dict[int, float]:
    """Median by gene number, for genes detected in at least one cell; relative error at most `RELATIVE_ERROR`."""
    if not len(sketch.keys):
        return {}
    genes = sketch.keys // NUM_BUCKETS
    edges = np.concatenate([[0], np.flatnonzero(np.diff(genes)) + 1, [len(genes)]])
    out = {}
    for lo, hi in pairwise(edges.tolist()):
        counts = sketch.counts[lo:hi]
        ends = np.cumsum(counts)
        n = int(ends[-1])
        values = []
        for rank in ((n - 1) // 2, n // 2):  # the two middle values, equal for odd n
            i = int(np.searchsorted(ends, rank, side="right"))
            bucket = int(sketch.keys[lo + i] % NUM_BUCKETS)
            left = np.ldexp(1 + (bucket & 255) / 256, (bucket >> SKETCH_BITS) - 20)
            width = np.ldexp(1 / 256, (bucket >> SKETCH_BITS) - 20)
            within = (rank - (int(ends[i]) - int(counts[i])) + 0.5) / int(counts[i])
            values.append(float(left + width * within))
        out[int(genes[lo])] = (values[0] + values[1]) / 2
    return out
