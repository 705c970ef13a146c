"""Rank value encoding of one block of counts (paper section 3.2, spec section 3): pure, compiled, no Ray.

A cell's genes are sorted by count / median (float64), descending; equal values by ascending token id, exactly. Depth
and the factor 10,000 are the same for all genes of a cell and are left out: they do not change the order.

Nothing is sorted where it can be looked up. Nearly all counts of a cell are small, and there are only so many pairs of
a small count and a gene: `Ranks` orders them all once per vocabulary. A cell is then a set of whole numbers, each
setting its bit, and reading the bits in order is the sentence. The few counts beyond the table are sorted by a merge
sort that compares value, then token, and are merged in while the bits are read. Every comparison is one of float64
values or whole numbers, so no processor and no block size changes a sentence.

Letters: N cells, G columns of the source, C counts of the table, V genes of the species, K ranks of a cell, T tokens of
the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from mixgf.compiled import jit
from mixgf.config import Tokens
from mixgf.vocab import CLS, SpeciesGenes

TABLE_COUNTS = 32
"""Counts 1 to this are looked up: over 99 % of the counts of UMI data."""
_RUN = 8
"""Values put in order by insertion before runs are merged."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The order of all pairs (count up to `TABLE_COUNTS`, gene of the species): rank 0 has the largest value."""

    genes: SpeciesGenes
    divide: bool
    rank_CV: np.ndarray
    """int32: rank of each pair (count, gene); the row of count 0 and the last column, no gene, hold the number of pairs."""
    token: np.ndarray
    """int32, by rank."""
    value: np.ndarray
    """float64, by rank: falling."""

    @classmethod
    def of(cls, genes: SpeciesGenes, scaling: str) -> Ranks:
        """Order the pairs of one species' genes; `scaling` as in `Tokens.scaling`."""
        divide = scaling == "divide"
        counts_C = np.arange(1, TABLE_COUNTS + 1, dtype=np.float64)
        medians_V = genes.medians[:, None]
        value_VC = counts_C / medians_V if divide else counts_C * medians_V
        order = np.argsort(-value_VC, axis=None, kind="stable")  # genes ascend in token id: so do equal values
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
    """Sort n pairs in place by falling value, then rising token; the others are room to work in."""
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


@jit
def _encode(  # noqa: PLR0912, PLR0915, PLR0917 (one pass, compiled; the steps are told apart by comments)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, position_G: np.ndarray, tokens_V: np.ndarray,
    medians_V: np.ndarray, divide: int, rank_CG: np.ndarray, rank_token: np.ndarray, rank_value: np.ndarray,
    cls: int, most: int, out: np.ndarray, out_offsets: np.ndarray,
) -> None:  # fmt: skip
    one, six, low = np.uint64(1), np.uint64(6), np.uint64(63)
    num_ranks, num_counts = rank_token.shape[0], rank_CG.shape[0]
    bits = np.zeros((num_ranks >> 6) + 1, np.uint64)  # one per rank, and one for what is no gene
    used = np.zeros((bits.shape[0] >> 6) + 1, np.uint64)  # one per word of `bits`
    nothing = ~(one << (np.uint64(num_ranks) & low))
    room = medians_V.shape[0]
    value, token = np.empty(room, np.float64), np.empty(room, np.int32)
    other_value, other_token = np.empty(room, np.float64), np.empty(room, np.int32)
    rank_K, word_W = np.empty(room + 64, np.int32), np.empty(room + 1, np.int32)
    n = out_offsets[0]
    for row in range(indptr.shape[0] - 1):
        # every count sets the bit of its rank, or waits among the large ones
        num_large = 0
        for p in range(indptr[row], indptr[row + 1]):
            count = data[p]
            if count < num_counts:
                rank = np.uint64(rank_CG[count, indices[p]])
                word = rank >> six
                bits[word] |= one << (rank & low)
                used[word >> six] |= one << (word & low)
            else:
                position = position_G[indices[p]]
                if position >= 0:
                    value[num_large] = count / medians_V[position] if divide else count * medians_V[position]
                    token[num_large] = tokens_V[position]
                    num_large += 1
        bits[num_ranks >> 6] &= nothing
        _sort(value, token, other_value, other_token, num_large)
        # the bits in order are the ranks in order: first which words hold any (a full sentence is read no further, only wiped)
        num_words, k = 0, 0
        for u in range(used.shape[0]):
            words = used[u]
            used[u] = 0
            while words:
                word_W[num_words] = (u << 6) + np.int64(trailing_zeros(words))
                words &= words - one
                num_words += 1
        # most words hold one bit or two: up to three are written without a branch, of which k counts the true ones
        for w in range(num_words):
            at = word_W[w]
            word, first = bits[at], np.int64(at) << 6
            bits[at] = 0
            if k >= most:
                continue
            for _ in range(3):
                rank_K[k] = first + np.int64(trailing_zeros(word))
                k += word != 0
                word &= word - one
            while word:
                rank_K[k] = first + np.int64(trailing_zeros(word))
                word &= word - one
                k += 1
        # their tokens, with the large ones between them
        if cls >= 0:
            out[n] = cls
            n += 1
        end = n + most
        done = 0
        for large in range(num_large):
            # the first rank that does not come before this one: leaps of 1, 2, 4, … and then halves
            upto, leap = done, 1
            while upto < k and _before(rank_value[rank_K[upto]], rank_token[rank_K[upto]], value[large], token[large]):
                upto, leap = upto + leap, 2 * leap
            above = min(upto, k)
            upto = min(above, upto - (leap >> 1) + 1)
            while upto < above:
                middle = (upto + above) >> 1
                if _before(rank_value[rank_K[middle]], rank_token[rank_K[middle]], value[large], token[large]):
                    upto = middle + 1
                else:
                    above = middle
            for i in range(done, min(upto, done + end - n)):
                out[n] = rank_token[rank_K[i]]
                n += 1
            done = upto
            if n >= end:
                break
            out[n] = token[large]
            n += 1
        for i in range(done, min(k, done + end - n)):
            out[n] = rank_token[rank_K[i]]
            n += 1
        out_offsets[row + 1] = n


class Encoder:
    """Makes cell sentences of the blocks of one source.

    Args:
        ranks: of the vocabulary genes of the source's species, made with `tokens.scaling`.
        position_G: int32, the position in `ranks.genes` of each column, -1 for none; no position twice.
        tokens: longest sentence, `<cls>`.
    """

    def __init__(self, ranks: Ranks, position_G: np.ndarray, tokens: Tokens) -> None:
        assert ranks.divide == (tokens.scaling == "divide"), tokens.scaling
        self._ranks, self._position_G, self._tokens = ranks, position_G, tokens
        self._rank_CG = np.ascontiguousarray(ranks.rank_CV[:, position_G])  # column -1 is no gene

    def __call__(
        self, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cell sentences of one CSR block.

        Args:
            data: int32 counts; those above 0 name each column at most once in a row (`mixgf.corpus.blocks` sees to that).
            indices: int32 columns.
            indptr: int64[N+1].
            out: int32, where the tokens are written, with room for all of them; None = a new array.

        Returns:
            (tokens_T int32, offsets int64[N+1]): row i holds tokens_T[offsets[i] : offsets[i + 1]].
        """
        num_rows, ranks, cls = len(indptr) - 1, self._ranks, self._tokens.cls
        most = self._tokens.max_len - int(cls)
        if out is None:
            out = np.empty(int(np.minimum(np.diff(indptr), most).sum()) + num_rows * int(cls), dtype=np.int32)
        out_offsets = np.zeros(num_rows + 1, dtype=np.int64)
        _encode(
            data, indices, indptr, self._position_G, ranks.genes.tokens, ranks.genes.medians, int(ranks.divide),
            self._rank_CG, ranks.token, ranks.value, CLS if cls else -1, most, out, out_offsets,
        )  # fmt: skip
        return out[: out_offsets[-1]], out_offsets
