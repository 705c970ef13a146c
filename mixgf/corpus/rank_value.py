"""Rank value encoding (paper section 3.2): raw counts of cells to cell sentences, the genes from highest to lowest value.

A gene's value is count / median (float64); equal values are ordered by ascending token id. The paper first divides by the
cell's depth and multiplies by 10,000. Both are the same for all genes of a cell, so they do not change the order.

Nearly all counts are small. `Ranks` therefore sorts all pairs of a small count and a gene once per vocabulary. A cell is
then a set of integers, which a bit map holds in order. The few larger counts are sorted by value and token, and merged in. Only float64 values and integers are compared, so neither processor nor block size changes a sentence.

Letters: N cells, G columns of the source, C counts of the table, V genes of the species, K ranks of a cell, T tokens of
the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixgf.arrays import read_only
from mixgf.config.data import Tokens
from mixgf.genes.vocabulary import CLS, SpeciesGenes
from mixgf.jit import jit, trailing_zeros

TABLE_COUNTS = 32
"""Largest count in the table of ranks: over 99 % of the counts of UMI data are at most this."""
_RUN = 8
"""Length of the runs that insertion sort orders before they are merged."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks of all pairs (count up to `TABLE_COUNTS`, gene of the species); rank 0 has the largest value."""

    genes: SpeciesGenes
    divide: bool
    """True: value = count / median, as in the paper; False: count * median."""
    rank_CV: np.ndarray
    """int32: rank of each pair (count, gene). The row of count 0 and the last column (no gene) hold the number of pairs."""
    token: np.ndarray
    """int32: token id by rank."""
    value: np.ndarray
    """float64: value by rank, descending."""

    @classmethod
    def of(cls, genes: SpeciesGenes, scaling: str) -> Ranks:
        """Rank the pairs of one species' genes; `scaling` is `divide` or `multiply`, as in `Tokens.scaling`."""
        divide = scaling == "divide"
        counts_C = np.arange(1, TABLE_COUNTS + 1, dtype=np.float64)
        medians_V = genes.medians[:, None]
        value_VC = counts_C / medians_V if divide else counts_C * medians_V
        order = np.argsort(-value_VC, axis=None, kind="stable")  # genes ascend in token id, so equal values do
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        rank_CV = np.full((TABLE_COUNTS + 1, len(genes.tokens) + 1), len(order), dtype=np.int32)
        rank_CV[1:, :-1] = rank.reshape(value_VC.shape).T
        return cls(
            genes, divide, rank_CV, genes.tokens[order // TABLE_COUNTS].astype(np.int32), value_VC.ravel()[order]
        )


@jit
def _before(value_a: float, token_a: int, value_b: float, token_b: int) -> bool:
    return value_a > value_b or (value_a == value_b and token_a < token_b)


@jit
def _sort(value: np.ndarray, token: np.ndarray, other_value: np.ndarray, other_token: np.ndarray, n: int) -> None:
    """Sort n pairs in place by descending value, then ascending token; `other_value` and `other_token` are workspace."""
    for start in range(0, n, _RUN):
        for i in range(start + 1, min(start + _RUN, n)):
            v, t, j = value[i], token[i], i - 1
            while j >= start and _before(v, t, value[j], token[j]):
                value[j + 1], token[j + 1] = value[j], token[j]
                j -= 1
            value[j + 1], token[j + 1] = v, t
    width = _RUN
    while width < n:
        for start in range(0, n, 2 * width):
            middle, stop = min(start + width, n), min(start + 2 * width, n)
            i, j = start, middle
            for k in range(start, stop):
                if j >= stop or (i < middle and not _before(value[j], token[j], value[i], token[i])):
                    other_value[k], other_token[k] = value[i], token[i]
                    i += 1
                else:
                    other_value[k], other_token[k] = value[j], token[j]
                    j += 1
        for k in range(n):
            value[k], token[k] = other_value[k], other_token[k]
        width *= 2


class _RowRanks(NamedTuple):
    """Ranks of all counts of some rows, and positions of the counts beyond the table of ranks."""

    rank_K: np.ndarray
    """int32: ranks, row after row, ascending in each."""
    stop_K: np.ndarray
    """int64: end of each row's ranks."""
    large_L: np.ndarray
    """int64: positions in `data` of counts above `TABLE_COUNTS`."""
    stop_L: np.ndarray
    """int64: end of each row's large counts."""


class _GeneValues(NamedTuple):
    """What tokens and values of counts follow from."""

    position_G: np.ndarray
    """int32: position of each column's gene in the species' genes, -1 = none."""
    tokens_V: np.ndarray
    """int32: token id of each gene of the species."""
    medians_V: np.ndarray
    """float64: median of each gene of the species."""
    divide: int
    """1: value = count / median; 0: count * median."""
    rank_token: np.ndarray
    """int32: token id by rank."""
    rank_value: np.ndarray
    """float64: value by rank, descending."""


@jit
def _look_up(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, start_N: np.ndarray, stop_N: np.ndarray, rank_P: np.ndarray,
    filled: np.ndarray, words: np.ndarray, found: _RowRanks,
) -> None:  # fmt: skip
    """Fill `found` with the ranks of rows [start, stop), ascending.

    Args:
        data: counts.
        indices: columns.
        start_N: start of each row.
        stop_N: end of each row.
        rank_P: the table of ranks by count and column, flattened.
        filled: uint64 bit map, which words of `words` are not 0; all zeros before and after.
        words: uint64 bit map with one bit per rank, and one for counts without a rank; all zeros before and after.
        found: arrays with room for all counts.
    """
    num_columns, k, n, one = np.uint64(rank_P.shape[0] // (TABLE_COUNTS + 1)), 0, 0, np.uint64(1)
    none = np.int64(rank_P[0])
    for row in range(start_N.shape[0]):
        for p in range(start_N[row], stop_N[row]):
            count = np.uint64(data[p])
            if count <= TABLE_COUNTS:
                rank = np.uint64(rank_P[count * num_columns + np.uint64(indices[p])])
                at = rank >> np.uint64(6)
                words[at] |= one << (rank & np.uint64(63))
                filled[at >> np.uint64(6)] |= one << (at & np.uint64(63))
            else:
                found.large_L[n] = p
                n += 1
        for i in range(filled.shape[0]):
            left = filled[i]
            filled[i] = 0
            while left:
                w = (i << 6) + trailing_zeros(left)
                left &= left - one
                word = words[w]
                words[w] = 0
                while word:
                    found.rank_K[k] = (w << 6) + trailing_zeros(word)
                    word &= word - one
                    k += 1
        if k > (found.stop_K[row - 1] if row else 0) and found.rank_K[k - 1] == none:
            k -= 1
        found.stop_K[row], found.stop_L[row] = k, n


@jit
def _end_before(  # noqa: PLR0917 (a compiled kernel)
    rank_K: np.ndarray, start: int, stop: int, genes: _GeneValues, value: float, token: int
) -> int:  # fmt: skip
    """End of the sorted ranks from `start` that precede (value, token), by exponential, then binary search."""
    upto, leap = start, 1
    while upto < stop and _before(genes.rank_value[rank_K[upto]], genes.rank_token[rank_K[upto]], value, token):
        upto, leap = upto + leap, 2 * leap
    above = min(upto, stop)
    upto = min(above, upto - (leap >> 1) + 1)
    while upto < above:
        middle = (upto + above) >> 1
        if _before(genes.rank_value[rank_K[middle]], genes.rank_token[rank_K[middle]], value, token):
            upto = middle + 1
        else:
            above = middle
    return upto


@jit
def _write_sentences(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, rows: _RowRanks, genes: _GeneValues, cls: int, most: int, out: np.ndarray,
    out_offsets: np.ndarray,
) -> None:  # fmt: skip
    """Write the sentences of rows from their ranks, and merge the large counts in.

    `cls` is the id of <cls>, -1 = none; `most` the most genes of a sentence; the first of `out_offsets` is 0.
    """
    rank_K = rows.rank_K
    room = genes.medians_V.shape[0]
    value, token = np.empty(room, np.float64), np.empty(room, np.int32)
    other_value, other_token = np.empty(room, np.float64), np.empty(room, np.int32)
    n, next_k, next_l = out_offsets[0], 0, 0
    for row in range(rows.stop_K.shape[0]):
        done, k = next_k, rows.stop_K[row]
        next_k = k
        num_large = 0
        for at in range(next_l, rows.stop_L[row]):
            p = rows.large_L[at]
            position = genes.position_G[indices[p]]
            if position >= 0:
                median = genes.medians_V[position]
                value[num_large] = data[p] / median if genes.divide else data[p] * median
                token[num_large] = genes.tokens_V[position]
                num_large += 1
        next_l = rows.stop_L[row]
        _sort(value, token, other_value, other_token, num_large)
        if cls >= 0:
            out[n] = cls
            n += 1
        end = n + most
        for large in range(num_large):
            upto = _end_before(rank_K, done, k, genes, value[large], token[large])
            for i in range(done, min(upto, done + end - n)):
                out[n] = genes.rank_token[rank_K[i]]
                n += 1
            done = upto
            if n >= end:
                break
            out[n] = token[large]
            n += 1
        for i in range(done, min(k, done + end - n)):
            out[n] = genes.rank_token[rank_K[i]]
            n += 1
        out_offsets[row + 1] = n


class Encoder:
    """Rank value encoder of one source: CSR blocks of counts to cell sentences.

    Args:
        ranks: of the source's species, made with `tokens.scaling`.
        position_G: int32, position in `ranks.genes` of each column, -1 = none; no position twice.
        tokens: length limit, and whether sentences begin with <cls>.
    """

    def __init__(self, ranks: Ranks, position_G: np.ndarray, tokens: Tokens) -> None:
        assert ranks.divide == (tokens.scaling == "divide"), tokens.scaling
        self._tokens = tokens
        self._values = _GeneValues(
            position_G, ranks.genes.tokens, ranks.genes.medians, int(ranks.divide), ranks.token, ranks.value
        )
        self._rank_P = ranks.rank_CV[:, position_G].ravel()  # column -1 is no gene
        self._rank_K, self._large_L = np.empty(0, np.int32), np.empty(0, np.int64)
        self._words = np.zeros((len(ranks.token) >> 6) + 1, np.uint64)
        self._filled = np.zeros((len(self._words) >> 6) + 1, np.uint64)

    def __call__(
        self, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, *, rows_N: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Cell sentences of one CSR block.

        Args:
            data: int32 counts; a row has at most one count above 0 per column (as `counts.read_blocks` gives them).
            indices: columns, of any integer type.
            indptr: int64.
            rows_N: rows to encode; None = all.
            out: int32 array for the tokens, large enough for all; None = a new array.

        Returns:
            (tokens_T int32, offsets int64[N+1]): the sentence of `rows_N[i]` is tokens_T[offsets[i] : offsets[i + 1]].
        """
        start_N, stop_N = indptr[:-1], indptr[1:]
        if rows_N is not None:
            start_N, stop_N = start_N[rows_N], stop_N[rows_N]
        length_N = stop_N - start_N
        num_rows, num_ranks, cls = len(length_N), int(length_N.sum()), self._tokens.cls
        most = self._tokens.max_len - int(cls)
        if out is None:
            out = np.empty(int(np.minimum(length_N, most).sum()) + num_rows * int(cls), dtype=np.int32)
        if num_ranks > len(self._rank_K):
            self._rank_K, self._large_L = np.empty(num_ranks, np.int32), np.empty(num_ranks, np.int64)
        rows = _RowRanks(self._rank_K, np.empty(num_rows, np.int64), self._large_L, np.empty(num_rows, np.int64))
        data, indices = read_only(data), read_only(indices)
        _look_up(data, indices, start_N, stop_N, self._rank_P, self._filled, self._words, rows)
        out_offsets = np.zeros(num_rows + 1, dtype=np.int64)
        _write_sentences(data, indices, rows, self._values, CLS if cls else -1, most, out, out_offsets)
        return out[: out_offsets[-1]], out_offsets
