"""Quality control: metrics of every cell, and one reason for every cell that is dropped.

Depth and mitochondrial filters follow the paper's section 3.2. Metrics depend on one cell alone; filters see all cells of
a source in row order; duplicates are found over all sources. So block size and number of workers do not change the result.
A dropped cell gets the first reason, in the order of `REASONS`, that applies.

Letters: N cells, G columns of the source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mixgf.arrays import read_only
from mixgf.cells.counts import Block
from mixgf.config.data import QC
from mixgf.jit import jit

REASONS = ("kept", "few_genes", "depth", "mito", "doublet", "duplicate", "cap")
KEPT, FEW_GENES, DEPTH, MITO, DOUBLET, DUPLICATE, CAP = range(7)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics of N cells."""

    n_counts: np.ndarray
    """int64: depth, the sum of all counts."""
    n_genes: np.ndarray
    """int32: detected genes that are candidates for the vocabulary."""
    n_mito: np.ndarray
    """int64: counts on mitochondrial genes."""
    hash_a: np.ndarray
    """uint64: first half of a hash of the counts of all identified genes; the order of genes does not matter."""
    hash_b: np.ndarray
    """uint64: second half of that hash."""

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of depth and hash of every cell, in order: equal for the same cells with the same counts, in any file."""
        digest = hashlib.sha256()
        for values in (self.n_counts, self.hash_a, self.hash_b):
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    @property
    def mito_fraction(self) -> np.ndarray:
        """float64: share of counts on mitochondrial genes; 0 for an empty cell."""
        return self.n_mito / np.maximum(self.n_counts, 1)

    @property
    def hashes(self) -> Hashes:
        """Both halves of the hash."""
        return Hashes(self.hash_a, self.hash_b)

    @staticmethod
    def merge(parts: Sequence[Metrics]) -> Metrics:
        """Metrics of consecutive row ranges as one table."""
        return Metrics(*(np.concatenate([getattr(p, f) for p in parts]) for f in Metrics.__slots__))


class Hashes(NamedTuple):
    """Hash of the counts of N cells, in two halves: `Metrics.hash_a` and `Metrics.hash_b`."""

    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of N cells: 4 bytes per cell, and each name once."""

    code_N: np.ndarray
    """int32: place in `names`."""
    names: tuple[str, ...]
    """Ascending."""

    def split(self, rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Name and rows of each sample that has some of the given rows; names and rows ascend."""
        code_R = self.code_N[rows]
        sorted_rows = rows[np.argsort(code_R, kind="stable")]
        edges = np.cumsum(np.bincount(code_R, minlength=len(self.names)))[:-1]
        parts = zip(self.names, np.split(sorted_rows, edges), strict=True)
        return [(name, part) for name, part in parts if len(part)]


@jit
def splitmix64(x: np.uint64) -> np.uint64:  # the finaliser of splitmix64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_COUNTED, _MITO, _CANDIDATE = 1, 2, 4


@jit
def _cell_metrics(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, flags: np.ndarray, key: np.ndarray, sums: np.ndarray,
    n_counts: np.ndarray, n_genes: np.ndarray, n_mito: np.ndarray, hash_a: np.ndarray, hash_b: np.ndarray,
) -> None:  # fmt: skip
    """Fill the metrics of all rows. The loop over hashes has no branches, so it compiles to vector instructions."""
    for row in range(indptr.shape[0] - 1):
        counts, columns = data[indptr[row] : indptr[row + 1]], indices[indptr[row] : indptr[row + 1]]
        a, b = np.uint64(0), np.uint64(0)
        for p in range(counts.shape[0]):
            k = key[columns[p]]
            x = splitmix64(k + np.uint64(counts[p]) * np.uint64(0x9E3779B97F4A7C15))
            x *= np.uint64((k != 0) & (counts[p] != 0))
            a += x
            b += (x ^ (x >> np.uint64(29))) * np.uint64(0xD1B54A32D192ED03)
        depth, mito, genes = np.int64(0), np.int64(0), np.int64(0)
        for p in range(counts.shape[0]):
            flag = np.int64(flags[columns[p]])
            count = np.int64(counts[p]) * (flag & _COUNTED)
            depth += count
            sums[columns[p]] += count
            mito += count * ((flag & _MITO) >> 1)
            genes += ((flag & _CANDIDATE) >> 2) * (count != 0)
        n_counts[row], n_mito[row], n_genes[row], hash_a[row], hash_b[row] = depth, mito, genes, a, b


def gene_masks(columns: pa.Table) -> dict[str, np.ndarray]:
    """What `cell_metrics` takes of the columns of a matrix, from the table of `identify.identify_columns`."""
    return {f"{name}_G": columns[name].to_numpy() for name in ("counted", "mito", "candidate", "key")}


def cell_metrics(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, *, counted_G: np.ndarray, mito_G: np.ndarray,
    candidate_G: np.ndarray, key_G: np.ndarray, sums_G: np.ndarray,
) -> Metrics:  # fmt: skip
    """Metrics of the cells of one CSR block.

    Args:
        data: counts.
        indices: columns, of any integer type.
        indptr: row pointers.
        counted_G: bool, columns that are genes.
        mito_G: bool, mitochondrial genes.
        candidate_G: bool, genes that may enter the vocabulary.
        key_G: uint64, hash key of each column's gene; 0 = not identified, not hashed.
        sums_G: int64, the block's counts by column are added to it.
    """
    n = len(indptr) - 1
    out = Metrics(
        np.zeros(n, np.int64),
        np.zeros(n, np.int32),
        np.zeros(n, np.int64),
        np.zeros(n, np.uint64),
        np.zeros(n, np.uint64),
    )
    counted, mito, candidate = (mask.view(np.uint8) for mask in (counted_G, mito_G, candidate_G))
    flags = counted * np.uint8(_COUNTED) + counted * mito * np.uint8(_MITO) + counted * candidate * np.uint8(_CANDIDATE)
    _cell_metrics(
        read_only(data), read_only(indices), read_only(indptr), flags, key_G * counted_G, sums_G,
        out.n_counts, out.n_genes, out.n_mito, out.hash_a, out.hash_b,
    )  # fmt: skip
    return out


def measure_blocks(blocks: Iterable[Block], columns: pa.Table) -> tuple[Metrics, np.ndarray]:
    """Metrics of all cells of the blocks of one source, and the sum of their counts by column (int64).

    Args:
        blocks: at least one.
        columns: of the source, the table of `identify.identify_columns`.
    """
    masks, sums_G = gene_masks(columns), np.zeros(columns.num_rows, dtype=np.int64)
    parts = [cell_metrics(b.data, b.indices, b.indptr, **masks, sums_G=sums_G) for b in blocks]
    return Metrics.merge(parts), sums_G


EQUAL_SUMS = 0.02
"""Spread of the cells' sums of counts, in units of their median, within which they are called equal."""
FEW_CELLS = 20


def equal_sums(metrics: Metrics) -> int:
    """The sum of counts that all but one in a hundred cells have, within `EQUAL_SUMS`; 0 if they differ, or cells are few.

    Sums of raw counts differ from cell to cell by far more.
    """
    sums = metrics.n_counts[metrics.n_counts > 0]
    if len(sums) < FEW_CELLS:
        return 0
    low, middle, high = np.percentile(sums, [0.5, 50, 99.5])
    return int(float(f"{middle:.3g}")) if middle >= 1 / EQUAL_SUMS and high - low <= EQUAL_SUMS * middle else 0


def doubt_counts(metrics: Metrics, candidate_counts: int) -> str:
    """What is to be said about the counts of all cells of a source: zeros, ones, or equal sums; empty where nothing is.

    `candidate_counts`: the sum of their counts on the genes of `Metrics.n_genes`.
    """
    genes = int(metrics.n_genes.sum())
    if not metrics.n_counts.any():
        return "every count is 0: no molecules; give another layer, or the file with counts"
    if candidate_counts == genes and len(metrics.n_counts) >= FEW_CELLS and genes >= MANY_GENES * len(metrics.n_counts):
        return "every count above 0 is 1: binarised (detected or not), or one read per gene? Ranks need raw counts"
    if found := equal_sums(metrics):
        return f"all cells have the same sum of counts ({found:,}): normalised and rounded, or drawn down to one depth? Raw counts differ from cell to cell"
    return ""


MANY_GENES = 20
"""Detected genes of a mean cell from which some gene should have two molecules."""


def filter_cells(metrics: Metrics, rules: QC) -> np.ndarray:
    """Reasons (int8[N], codes of `REASONS`, 0 = kept) by the filters within one source.

    Method `sd` drops cells beyond `num_sd` standard deviations of the mean depth or mitochondrial fraction. The standard
    deviation is that of the population: the sum of squares is divided by the number of cells, not by one less. Method `mad`
    uses the median and the median absolute deviation of log1p(depth) and of log1p(mitochondrial counts per 10,000); it
    drops nothing where the MAD is 0. Both are computed over cells with at least `min_genes` genes, so that empty droplets
    do not matter.

    Args:
        metrics: of all cells of the source, in row order.
        rules: thresholds.
    """
    reason = np.zeros(len(metrics.n_counts), dtype=np.int8)
    reason[metrics.n_genes < rules.min_genes] = FEW_GENES
    good = reason == KEPT
    depth, mito = metrics.n_counts.astype(np.float64), metrics.mito_fraction
    outlier: dict[int, np.ndarray] = {DEPTH: np.zeros_like(good), MITO: mito > rules.max_mito_fraction}
    if rules.method == "sd":
        outlier[DEPTH] = _beyond_sd(depth, good, rules.num_sd)
        outlier[MITO] |= _beyond_sd(mito, good, rules.num_sd)
    elif rules.method == "mad":
        outlier[DEPTH] = _beyond_mad(np.log1p(depth), good, rules.num_mads)
        outlier[MITO] |= _beyond_mad(np.log1p(mito * 10_000), good, rules.num_mads)
    for code, mask in outlier.items():
        reason[mask & (reason == KEPT)] = code
    return reason


def _beyond_sd(values: np.ndarray, good: np.ndarray, times: float) -> np.ndarray:
    x = values[good]
    if not len(x):
        return np.zeros_like(good)
    mean = math.fsum(x.tolist()) / len(x)  # fsum is exact: the same result on every processor
    sd = math.sqrt(math.fsum(np.square(x - mean).tolist()) / len(x))
    return np.abs(values - mean) > times * sd * (1 + 1e-12) + 1e-15


def _beyond_mad(values: np.ndarray, good: np.ndarray, times: float) -> np.ndarray:
    if not good.any():
        return np.zeros_like(good)
    median = np.median(values[good])
    mad = np.median(np.abs(values[good] - median))
    return np.abs(values - median) > times * mad if mad > 0 else np.zeros_like(good)


SORTED_CELLS = 1 << 22
"""Cells that `mark_duplicates` sorts at a time, about."""


def mark_duplicates(hashes: Sequence[Hashes], reasons: Sequence[np.ndarray]) -> None:
    """Mark cells with the same counts as an earlier kept cell, in order of source, then row. Changes `reasons`.

    Counts are compared by a 128-bit hash. Cells are sorted in groups by the first bits of the hash, so memory beside the
    arguments does not grow with the number of cells: about 40 bytes per cell of `SORTED_CELLS`.
    """
    kept = sum(int(np.count_nonzero(r == KEPT)) for r in reasons)
    bits = max(0, kept // SORTED_CELLS).bit_length()
    shift = np.uint64(64 - bits)
    for group in range(1 << bits):
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for h, reason in zip(hashes, reasons, strict=True):
            mine = reason == KEPT if bits == 0 else (h.a >> shift == group) & (reason == KEPT)
            rows = np.flatnonzero(mine)
            found.append((h.a[rows], h.b[rows], rows))
        same = _later_copies(*(np.concatenate([part[k] for part in found]) for k in (0, 1)))
        start = 0
        for reason, (_, _, rows) in zip(reasons, found, strict=True):
            reason[rows[same[start : start + len(rows)]]] = DUPLICATE
            start += len(rows)


def _later_copies(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool[K]: cells whose hash an earlier cell has."""
    order = np.argsort(a)
    equal = a[order[1:]] == a[order[:-1]]
    suspect = np.zeros(len(a), dtype=bool)  # another cell has the same first half: few, so only these are sorted fully
    suspect[order[1:][equal]] = suspect[order[:-1][equal]] = True
    rows = np.flatnonzero(suspect)
    rows = rows[np.lexsort((b[rows], a[rows]))]  # stable: the earliest of equal cells stays first
    same = np.zeros(len(a), dtype=bool)
    same[rows[1:]] = (a[rows[1:]] == a[rows[:-1]]) & (b[rows[1:]] == b[rows[:-1]])
    return same


def cap_per_sample(reason_N: np.ndarray, samples: Samples | None, most: int, key: str, seed: int) -> None:
    """Keep at most `most` cells of each sample, drawn at random. Changes `reason_N`.

    Args:
        reason_N: reasons of one source's cells.
        samples: of the cells; None = all cells are one sample.
        most: cells kept of a sample.
        key: name of the source; with `seed` and the sample's name it seeds the draw.
        seed: of the run.
    """
    rows = np.flatnonzero(reason_N == KEPT)
    for name, mine in [("0", rows)] if samples is None else samples.split(rows):
        digest = hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()
        order = np.random.default_rng([seed, int.from_bytes(digest, "little")]).permutation(len(mine))
        reason_N[mine[order[most:]]] = CAP


def count_reasons(reason_N: np.ndarray) -> dict[str, int]:
    """Number of cells by reason, reasons without cells included."""
    return dict(zip(REASONS, np.bincount(reason_N, minlength=len(REASONS)).tolist(), strict=True))
