"""Quality control: metrics of every cell, and one reason for every cell that is dropped.

Depth and mitochondrial filters follow the paper's section 3.2. Metrics depend on one cell alone; filters see all cells of
a source in row order; duplicates are found over all sources. So block size and number of workers do not change the result.
A dropped cell gets the first reason, in the order of `REASONS`, that applies.

Letters: N cells, G columns of the source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    def mito_fraction(self) -> np.ndarray:
        """float64: share of counts on mitochondrial genes; 0 for an empty cell."""
        return self.n_mito / np.maximum(self.n_counts, 1)

    @staticmethod
    def merge(parts: Sequence[Metrics]) -> Metrics:
        """Metrics of consecutive row ranges as one table."""
        return Metrics(*(np.concatenate([getattr(p, f) for p in parts]) for f in Metrics.__slots__))


@jit
def _splitmix64(x: np.uint64) -> np.uint64:  # the finaliser of splitmix64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_COUNTED, _MITO, _CANDIDATE = 1, 2, 4


@jit
def _cell_metrics(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, flags: np.ndarray, key: np.ndarray, sums: np.ndarray,
    n_counts: np.ndarray, n_genes: np.ndarray, n_mito: np.ndarray, hash_a: np.ndarray, hash_b: np.ndarray,
) -> None:  # fmt: skip
    for row in range(indptr.shape[0] - 1):
        a, b = np.uint64(0), np.uint64(0)
        depth, mito, genes = np.int64(0), np.int64(0), 0
        for p in range(indptr[row], indptr[row + 1]):
            c, count = indices[p], np.int64(data[p])
            flag = flags[c]
            if count == 0 or flag == 0:
                continue
            depth += count
            sums[c] += count
            mito += count * ((flag & _MITO) >> 1)
            genes += (flag & _CANDIDATE) >> 2
            if key[c] != 0:
                x = _splitmix64(key[c] + np.uint64(count) * np.uint64(0x9E3779B97F4A7C15))
                a += x
                b += (x ^ (x >> np.uint64(29))) * np.uint64(0xD1B54A32D192ED03)
        n_counts[row], n_mito[row], n_genes[row], hash_a[row], hash_b[row] = depth, mito, genes, a, b


def cell_metrics(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, *, counted_G: np.ndarray, mito_G: np.ndarray,
    candidate_G: np.ndarray, key_G: np.ndarray, sums_G: np.ndarray,
) -> Metrics:  # fmt: skip
    """Metrics of the cells of one CSR block.

    Args:
        data: counts.
        indices: columns.
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
    flags = (counted_G * _COUNTED + mito_G * _MITO + candidate_G * _CANDIDATE).astype(np.uint8) * counted_G
    _cell_metrics(
        data, indices, indptr, flags, key_G, sums_G, out.n_counts, out.n_genes, out.n_mito, out.hash_a, out.hash_b
    )
    return out


def filter_cells(metrics: Metrics, rules: QC, doublet_N: np.ndarray | None = None) -> np.ndarray:
    """Reasons (int8[N], codes of `REASONS`, 0 = kept) by the filters within one source.

    Method `sd` drops cells beyond `num_sd` standard deviations of the mean depth or mitochondrial fraction. Method `mad`
    uses the median and the median absolute deviation of log1p(depth) and of log1p(mitochondrial counts per 10,000); it
    drops nothing where the MAD is 0. Both are computed over cells with at least `min_genes` genes, so that empty droplets
    do not matter.

    Args:
        metrics: of all cells of the source, in row order.
        rules: thresholds.
        doublet_N: bool, cells called doublets; None = not looked for.
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
    if doublet_N is not None:
        outlier[DOUBLET] = doublet_N
    for code, mask in outlier.items():
        reason[mask & (reason == KEPT)] = code
    return reason


def _beyond_sd(values: np.ndarray, good: np.ndarray, times: float) -> np.ndarray:
    x = values[good].tolist()
    if not x:
        return np.zeros_like(good)
    mean = math.fsum(x) / len(x)  # fsum is exact: the same result on every processor
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x))
    return np.abs(values - mean) > times * sd * (1 + 1e-12) + 1e-15


def _beyond_mad(values: np.ndarray, good: np.ndarray, times: float) -> np.ndarray:
    if not good.any():
        return np.zeros_like(good)
    median = np.median(values[good])
    mad = np.median(np.abs(values[good] - median))
    return np.abs(values - median) > times * mad if mad > 0 else np.zeros_like(good)


def mark_duplicates(metrics: Sequence[Metrics], reasons: Sequence[np.ndarray]) -> None:
    """Mark cells with the same counts as an earlier kept cell, in order of source, then row. Changes `reasons`.

    Counts are compared by a 128-bit hash. Memory: 24 bytes per kept cell.
    """
    where = [np.flatnonzero(r == KEPT) for r in reasons]
    if not any(len(w) for w in where):
        return
    a = np.concatenate([m.hash_a[w] for m, w in zip(metrics, where, strict=True)])
    b = np.concatenate([m.hash_b[w] for m, w in zip(metrics, where, strict=True)])
    order = np.lexsort((b, a))  # stable: the earliest of equal cells stays first
    same = np.zeros(len(a), dtype=bool)
    same[order[1:]] = (a[order[1:]] == a[order[:-1]]) & (b[order[1:]] == b[order[:-1]])
    edges = np.cumsum([0, *(len(w) for w in where)])
    for reason, w, lo, hi in zip(reasons, where, edges[:-1], edges[1:], strict=True):
        reason[w[same[lo:hi]]] = DUPLICATE


def cap_per_sample(reason_N: np.ndarray, sample_N: np.ndarray | None, most: int, key: str, seed: int) -> None:
    """Keep at most `most` cells of each sample, drawn at random. Changes `reason_N`.

    Args:
        reason_N: reasons of one source's cells.
        sample_N: sample of each cell; None = all cells are one sample.
        most: cells kept of a sample.
        key: name of the source; with `seed` and the sample's name it seeds the draw.
        seed: of the run.
    """
    rows = np.flatnonzero(reason_N == KEPT)
    samples = np.zeros(len(rows), dtype=object) if sample_N is None else sample_N[rows]
    names = np.asarray([str(s) for s in samples], dtype=object)
    for name in sorted(set(names.tolist())):
        mine = rows[names == name]
        digest = hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()
        order = np.random.default_rng([seed, int.from_bytes(digest, "little")]).permutation(len(mine))
        reason_N[mine[order[most:]]] = CAP


def count_reasons(reason_N: np.ndarray) -> dict[str, int]:
    """Number of cells by reason, reasons without cells included."""
    return {name: int((reason_N == code).sum()) for code, name in enumerate(REASONS)}
