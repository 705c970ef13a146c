"""Median of each gene over all cells of a corpus, from mergeable histograms (sketches).

The median is that of count / depth * 10,000 over the kept cells of the species in which the gene is detected. Rank value
encoding divides by it (paper section 3.2). A histogram has 256 buckets per power of two; values are taken as evenly
spread within a bucket. The relative error is at most 1/256 = 0.39 %.

Bucket counts are whole numbers, and buckets are found from the bits of the float64. So the result depends neither on the
order or partition of the cells nor on the processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mixgf.arrays import read_only
from mixgf.jit import jit, trailing_zeros

SKETCH_BITS = 8
_LOWEST = 1023 - 20  # the exponent field of 2**-20: count 1 in a cell of 10**10 counts
_OCTAVES = 36  # up to 2**16, above the largest value, 10,000
NUM_BUCKETS = _OCTAVES << SKETCH_BITS
RELATIVE_ERROR = 2.0**-SKETCH_BITS
_SMALL = 33
"""Buckets of counts below this are computed once per cell."""
_PAGE = 128
"""Values of a gene that lie together in memory."""


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


class _Lists(NamedTuple):
    """One list of buckets per gene, in pages of `_PAGE` values; page g is the first one of gene g."""

    bucket_T: np.ndarray
    """uint16: the pages."""
    next_P: np.ndarray
    """int32: the page that follows each full page."""
    end_G: np.ndarray
    """int32: end of each gene's values, in its last page."""


@jit
def _append(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, depth: np.ndarray, keep: np.ndarray, gene: np.ndarray,
    lists: _Lists, used: int,
) -> int:  # fmt: skip
    """Append the buckets of the kept rows to the lists; `used` pages are in use before, the result after it.

    The lists of all genes end in about as many cache lines, which a processor core holds. A dense histogram of genes and
    buckets would be far larger than its caches.
    """
    room, small = np.empty(1), np.zeros(_SMALL, np.uint16)
    for row in range(indptr.shape[0] - 1):
        if not keep[row]:
            continue
        for count in range(1, _SMALL):
            small[count] = _bucket(count, depth[row], room)
        for p in range(indptr[row], indptr[row + 1]):
            g, count = gene[indices[p]], data[p]
            if g >= 0 and count > 0:
                at = lists.end_G[g]
                lists.bucket_T[at] = small[count] if count < _SMALL else _bucket(count, depth[row], room)
                at += 1
                if at % _PAGE == 0:
                    lists.next_P[at // _PAGE - 1] = used
                    at = used * _PAGE
                    used += 1
                lists.end_G[g] = at
    return used


class _Histogram(NamedTuple):
    """Counts of the buckets of one gene; all zeros between genes."""

    counts: np.ndarray
    """uint32 by bucket."""
    filled: np.ndarray
    """uint64 bit map: which buckets are not 0."""


def _histogram() -> _Histogram:
    return _Histogram(np.zeros(NUM_BUCKETS, np.uint32), np.zeros(NUM_BUCKETS // 64, np.uint64))


@jit
def _increase(histogram: _Histogram, bucket: Any, number: Any) -> None:
    histogram.counts[bucket] += number
    histogram.filled[bucket >> 6] |= np.uint64(1) << np.uint64(bucket & 63)


@jit
def _move(histogram: _Histogram, gene: int, keys: np.ndarray, counts: np.ndarray, n: int) -> int:
    """Move one gene's histogram behind the first n keys; returns the new number of keys."""
    for i in range(histogram.filled.shape[0]):
        left = histogram.filled[i]
        histogram.filled[i] = 0
        while left:
            bucket = (i << 6) + trailing_zeros(left)
            left &= left - np.uint64(1)
            keys[n], counts[n] = gene * 9216 + bucket, histogram.counts[bucket]
            histogram.counts[bucket] = 0
            n += 1
    return n


@jit
def _add(keys: np.ndarray, counts: np.ndarray, at: int, gene: int, histogram: _Histogram) -> int:
    """Add one gene's part of a sketch, from position `at` on; returns its end."""
    first, stop = np.int64(gene) * 9216, np.int64(gene + 1) * 9216
    while at < keys.shape[0] and np.int64(keys[at]) < stop:
        _increase(histogram, np.int64(keys[at]) - first, counts[at])
        at += 1
    return at


@jit
def _collect(  # noqa: PLR0917 (a compiled kernel)
    lists: _Lists, old_keys: np.ndarray, old_counts: np.ndarray, histogram: _Histogram, keys: np.ndarray,
    counts: np.ndarray,
) -> int:  # fmt: skip
    """Write the sketch of the lists' values and of an older sketch; returns its number of keys."""
    n, old, one = 0, 0, np.uint32(1)
    for g in range(lists.end_G.shape[0]):
        page, last = g, lists.end_G[g] // _PAGE
        while True:
            stop = lists.end_G[g] if page == last else (page + 1) * _PAGE
            for i in range(page * _PAGE, stop):
                _increase(histogram, np.int64(lists.bucket_T[i]), one)
            if page == last:
                break
            page = lists.next_P[page]
        old = _add(old_keys, old_counts, old, g, histogram)
        n = _move(histogram, g, keys, counts, n)
    return n


@jit
def _merge(  # noqa: PLR0917 (a compiled kernel)
    keys_a: np.ndarray, counts_a: np.ndarray, keys_b: np.ndarray, counts_b: np.ndarray, histogram: _Histogram,
    keys: np.ndarray, counts: np.ndarray,
) -> int:  # fmt: skip
    """Write the sum of two sketches; returns its number of keys."""
    n, a, b = 0, 0, 0
    while a < keys_a.shape[0] or b < keys_b.shape[0]:
        gene: Any = 1 << 32
        if a < keys_a.shape[0]:
            gene = np.int64(keys_a[a]) // 9216
        if b < keys_b.shape[0]:
            gene = min(gene, np.int64(keys_b[b]) // 9216)
        a = _add(keys_a, counts_a, a, gene, histogram)
        b = _add(keys_b, counts_b, b, gene, histogram)
        n = _move(histogram, gene, keys, counts, n)
    return n


class SketchBuilder:
    """Builds the sketch of cells, block by block.

    Memory: the sketch, 256 bytes per gene, and 2 bytes for each of the values that have not yet moved to the sketch.
    """

    def __init__(self, num_genes: int, *, most_values: int = 24 << 20) -> None:
        """Start with no cells.

        Args:
            num_genes: genes.
            most_values: values that are held before they move to the sketch; a row is never divided.
        """
        assert (SKETCH_BITS, _LOWEST, NUM_BUCKETS) == (8, 1003, 9216), "compiled into the kernels above"
        assert num_genes * NUM_BUCKETS < 1 << 31, num_genes
        self._num_genes, self._most_values = num_genes, most_values
        num_pages = num_genes + (most_values + num_genes) // _PAGE + 1
        self._lists = _Lists(
            np.empty(num_pages * _PAGE, np.uint16), np.empty(num_pages, np.int32), np.empty(num_genes, np.int32)
        )
        self._total = EMPTY
        self._clear()

    def _clear(self) -> None:
        self._num_values, self._used_pages = 0, self._num_genes
        self._lists.end_G[:] = np.arange(self._num_genes) * _PAGE

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
            indices: columns, of any integer type.
            indptr: row pointers.
            depth_N: depth of each row.
            keep_N: bool, rows to add.
            gene_G: number of the gene of each column, -1 = none; no gene twice.
        """
        depth = depth_N.astype(np.float64)
        data, indices = read_only(data), read_only(indices)
        first = 0
        while first < len(depth):
            room = self._most_values - self._num_values
            stop = int(np.searchsorted(indptr, indptr[first] + room, side="right")) - 1
            if stop <= first and self._num_values:
                self._flush()
                continue
            stop = max(stop, first + 1)  # a row has at most `num_genes` values
            rows, ends = slice(first, stop), slice(first, stop + 1)
            self._used_pages = _append(
                data, indices, read_only(indptr[ends]), depth[rows], keep_N[rows], gene_G, self._lists, self._used_pages
            )
            self._num_values += int(indptr[stop] - indptr[first])
            first = stop

    def _flush(self) -> None:
        most = self._num_values + len(self._total.keys)
        keys, counts = np.empty(most, np.uint32), np.empty(most, np.uint32)
        n = _collect(self._lists, self._total.keys, self._total.counts, _histogram(), keys, counts)
        self._total = _cut(keys, counts, n)
        self._clear()

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
        n = _merge(total.keys, total.counts, sketch.keys, sketch.counts, _histogram(), keys, counts)
        total = _cut(keys, counts, n)
    return total


def median_by_gene(sketch: Sketch) -> dict[int, float]:
    """Median by gene number, for genes detected in at least one cell; relative error at most `RELATIVE_ERROR`."""
    out = {}
    for gene, bucket, ends in _by_gene(sketch):
        n = int(ends[-1])
        low, high = (_value(bucket, ends, rank) for rank in ((n - 1) // 2, n // 2))  # equal for odd n
        out[gene] = (low + high) / 2
    return out


def standard_errors(sketch: Sketch, least: int = 30) -> dict[int, float]:
    """Standard error of each median, as a share of it, if the cells are a small random sample.

    The number of sampled values below the true median is binomial, with a standard deviation of sqrt(n) / 2. So two standard errors
    are half the distance of the values sqrt(n) ranks below and above the middle one. Genes with fewer than `least` values are left out.
    """
    out = {}
    for gene, bucket, ends in _by_gene(sketch):
        n = int(ends[-1])
        if n >= least:
            away = np.sqrt(n)
            low, middle, high = (_value(bucket, ends, round((n - 1) / 2 + d)) for d in (-away, 0.0, away))
            out[gene] = (high - low) / 4 / middle
    return out


def _by_gene(sketch: Sketch) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, filled buckets and running numbers of values of each gene."""
    genes = sketch.keys // NUM_BUCKETS
    edges = np.concatenate([[0], np.flatnonzero(np.diff(genes)) + 1, [len(genes)]])
    for lo, hi in pairwise(edges.tolist()):
        if hi > lo:
            yield int(genes[lo]), sketch.keys[lo:hi] % NUM_BUCKETS, np.cumsum(sketch.counts[lo:hi])


def _value(bucket: np.ndarray, ends: np.ndarray, rank: int) -> float:
    """The value of a rank, 0 = the smallest."""
    i = int(np.searchsorted(ends, rank, side="right"))
    at, before = int(bucket[i]), int(ends[i - 1]) if i else 0
    left = np.ldexp(1 + (at & 255) / 256, (at >> SKETCH_BITS) - 20)
    width = np.ldexp(1 / 256, (at >> SKETCH_BITS) - 20)
    within = (rank - before + 0.5) / (int(ends[i]) - before)
    return float(left + width * within)
