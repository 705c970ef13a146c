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
from typing import Any, NamedTuple

import numpy as np

from mixgf.arrays import read_only
from mixgf.jit import jit

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


@jit
def _collect(lists: _Lists, histogram: np.ndarray, keys: np.ndarray, counts: np.ndarray) -> int:
    """Write the sketch of the lists' values; returns its number of keys.

    `histogram` (uint32 by bucket) is all zeros between genes. `keys` and `counts` have room for one entry more than there are values.
    """
    n: Any = 0
    for g in range(lists.end_G.shape[0]):
        page, last = g, lists.end_G[g] // _PAGE
        low: Any = np.int64(histogram.shape[0])
        high: Any = np.int64(-1)
        while True:
            stop = lists.end_G[g] if page == last else (page + 1) * _PAGE
            for i in range(page * _PAGE, stop):
                bucket = np.int64(lists.bucket_T[i])
                histogram[bucket] += np.uint32(1)
                low, high = min(low, bucket), max(high, bucket)
            if page == last:
                break
            page = lists.next_P[page]
        for key in range(low, high + 1):  # without branches: an empty bucket is written, and then overwritten
            keys[n], counts[n] = g * 9216 + key, histogram[key]
            n += np.int64(histogram[key] != 0)
        histogram[low : high + 1] = 0
    return n


@jit
def _merge(  # noqa: PLR0917 (a compiled kernel)
    keys_a: np.ndarray, counts_a: np.ndarray, keys_b: np.ndarray, counts_b: np.ndarray, keys: np.ndarray,
    counts: np.ndarray,
) -> int:  # fmt: skip
    """Write the sum of two sketches; returns its number of keys."""
    n: Any = 0
    a: Any = 0
    b: Any = 0
    while a < keys_a.shape[0] and b < keys_b.shape[0]:  # without branches: which key comes next cannot be predicted
        in_a, in_b = keys_a[a] <= keys_b[b], keys_b[b] <= keys_a[a]
        keys[n] = min(keys_a[a], keys_b[b])
        counts[n] = counts_a[a] * np.uint32(in_a) + counts_b[b] * np.uint32(in_b)
        a, b, n = a + np.int64(in_a), b + np.int64(in_b), n + 1
    for i in range(a, keys_a.shape[0]):
        keys[n], counts[n] = keys_a[i], counts_a[i]
        n += 1
    for i in range(b, keys_b.shape[0]):
        keys[n], counts[n] = keys_b[i], counts_b[i]
        n += 1
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
        keys, counts = np.empty(self._num_values + 1, np.uint32), np.empty(self._num_values + 1, np.uint32)
        n = _collect(self._lists, np.zeros(NUM_BUCKETS, np.uint32), keys, counts)
        self._total = merge_sketches([self._total, _cut(keys, counts, n)])
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
        if not len(total.keys) or not len(sketch.keys):
            total = sketch if len(sketch.keys) else total
            continue
        most = len(total.keys) + len(sketch.keys)
        keys, counts = np.empty(most, np.uint32), np.empty(most, np.uint32)
        n = _merge(total.keys, total.counts, sketch.keys, sketch.counts, keys, counts)
        total = _cut(keys, counts, n)
    return total


def median_by_gene(sketch: Sketch) -> dict[int, float]:
    """Median by gene number, for genes detected in at least one cell; relative error at most `RELATIVE_ERROR`."""
    values = _Values(sketch)
    low_G, high_G = (
        values.of_rank(rank_G) for rank_G in ((values.num_G - 1) // 2, values.num_G // 2)
    )  # equal for odd n
    return dict(zip(values.gene_G.tolist(), ((low_G + high_G) / 2).tolist(), strict=True))


def standard_errors(sketch: Sketch, least: int = 30) -> dict[int, float]:
    """Standard error of each median, as a share of it, if the cells are a small random sample.

    The number of sampled values below the true median is binomial, with a standard deviation of sqrt(n) / 2. So two standard errors
    are half the distance of the values sqrt(n) ranks below and above the middle one. Genes with fewer than `least` values are left out.
    """
    values = _Values(sketch)
    middle_G, away_G = (values.num_G - 1) / 2, np.sqrt(values.num_G)
    ranks = (np.rint(middle_G + sign * away_G).astype(np.int64) for sign in (-1, 0, 1))
    low_G, median_G, high_G = (values.of_rank(np.clip(rank_G, 0, values.num_G - 1)) for rank_G in ranks)
    enough_G = values.num_G >= least
    errors_G = (high_G - low_G) / 4 / median_G
    return dict(zip(values.gene_G[enough_G].tolist(), errors_G[enough_G].tolist(), strict=True))


class _Values:
    """The sorted values of G genes, as a sketch has them; G are the genes with a value, ascending."""

    def __init__(self, sketch: Sketch) -> None:
        most = int(sketch.keys[-1]) // NUM_BUCKETS + 1 if len(sketch.keys) else 0
        edges = np.searchsorted(sketch.keys, np.arange(most + 1, dtype=np.uint32) * np.uint32(NUM_BUCKETS))
        self.gene_G = np.flatnonzero(np.diff(edges))
        self._sketch, self._edges = sketch, edges
        self.num_G: np.ndarray = np.add.reduceat(sketch.counts, edges[self.gene_G], dtype=np.int64)
        """Number of values."""

    def of_rank(self, rank_G: np.ndarray) -> np.ndarray:
        """float64: the value of each gene with a rank, 0 = the smallest."""
        found_G = np.empty(len(rank_G))
        _find_values(self._sketch.keys, self._sketch.counts, self.gene_G, self._edges, rank_G, found_G)
        return found_G


@jit
def _find_values(  # noqa: PLR0917 (a compiled kernel)
    keys: np.ndarray, counts: np.ndarray, gene_G: np.ndarray, edges: np.ndarray, rank_G: np.ndarray, found_G: np.ndarray
) -> None:
    """Fill the value of a rank of each gene; the values of a bucket are evenly spread in it."""
    for k in range(gene_G.shape[0]):
        i: Any = edges[gene_G[k]]
        before: Any = np.int64(0)
        while before + np.int64(counts[i]) <= rank_G[k]:
            before += np.int64(counts[i])
            i += 1
        bucket = np.int64(keys[i]) % 9216
        octave = 2.0 ** np.float64((bucket >> 8) - 20)
        within = (rank_G[k] - before + 0.5) / np.int64(counts[i])
        found_G[k] = (1 + (bucket & 255) / 256) * octave + octave / 256 * within
