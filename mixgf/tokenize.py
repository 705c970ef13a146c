"""Rank value encoding of one block of counts (paper section 3.2, spec section 3): pure, compiled, no Ray.

A cell's genes are sorted by count / median (float64), descending; equal values by ascending token id, exactly. Depth
and the factor 10,000 are the same for all genes of a cell and are left out: they do not change the order.

The sort key is one uint64: the inverted bits of the float64, its low bits replaced by the gene's position among the
tokens of its species. So the sort itself breaks exact ties. Values that differ only in the replaced bits (a relative
gap below 2**-36) are put right afterwards by comparing the values themselves.

Letters: N cells, G columns of the source, T tokens of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import numba
import numpy as np

from mixgf.config import Tokens
from mixgf.vocab import CLS, SpeciesGenes

F = TypeVar("F", bound=Callable[..., Any])
_jit: Callable[[F], F] = numba.njit(cache=True, nogil=True)

STRIP_CELLS = 64
"""Cells whose keys are in the processor's cache at a time."""


@_jit
def _pack(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, position_G: np.ndarray, weight: np.ndarray, low: int,
    divide: int, value: np.ndarray, keys: np.ndarray, offsets: np.ndarray,
) -> None:  # fmt: skip
    """Write the sort keys of every row one after another; `offsets` receives where each row's keys begin."""
    bits = value.view(np.uint64)
    mask = ~np.uint64((1 << low) - 1)
    n = 0
    for row in range(indptr.shape[0] - 1):
        offsets[row] = n
        for p in range(indptr[row], indptr[row + 1]):
            position = position_G[indices[p]]
            if position >= 0 and data[p] > 0:
                value[0] = data[p] / weight[position] if divide else data[p] * weight[position]
                keys[n] = (~bits[0] & mask) | np.uint64(position)
                n += 1
    offsets[indptr.shape[0] - 1] = n


@_jit
def _unpack(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, position_G: np.ndarray, weight: np.ndarray, low: int,
    divide: int, keys: np.ndarray, offsets: np.ndarray, tokens_G: np.ndarray, cls: int, most: int,
    out: np.ndarray, out_offsets: np.ndarray,
) -> None:  # fmt: skip
    """Repair near ties within the first `most` genes of every row; write its tokens from `out_offsets[0]` on."""
    mask = np.uint64((1 << low) - 1)
    value = np.zeros(weight.shape[0])
    n = out_offsets[0]
    for row in range(indptr.shape[0] - 1):
        lo, hi = offsets[row], offsets[row + 1]
        known = False  # whether `value` holds this row's values
        a = lo
        while a < min(hi, lo + most):
            b = a + 1
            while b < hi and (keys[b] | mask) == (keys[a] | mask):
                b += 1
            if b - a > 1:
                if not known:
                    known = True
                    for p in range(indptr[row], indptr[row + 1]):
                        position = position_G[indices[p]]
                        if position >= 0:
                            value[position] = data[p] / weight[position] if divide else data[p] * weight[position]
                for i in range(a + 1, b):  # insertion sort; a run is in order of position, so equal values stay put
                    key = keys[i]
                    x = value[np.int64(key & mask)]
                    j = i - 1
                    while j >= a and value[np.int64(keys[j] & mask)] < x:
                        keys[j + 1] = keys[j]
                        j -= 1
                    keys[j + 1] = key
            a = b
        if cls >= 0:
            out[n] = cls
            n += 1
        for i in range(lo, min(hi, lo + most)):
            out[n] = tokens_G[np.int64(keys[i] & mask)]
            n += 1
        out_offsets[row + 1] = n


def encode(
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    *,
    position_G: np.ndarray,
    genes: SpeciesGenes,
    tokens: Tokens,
) -> tuple[np.ndarray, np.ndarray]:
    """Cell sentences of one CSR block.

    Args:
        data: int32 counts; rows hold each column at most once (`mixgf.corpus.blocks` sees to that).
        indices: int32 columns.
        indptr: int64[N+1].
        position_G: int32, the position in `genes` of each column, -1 for none; no position twice.
        genes: vocabulary genes of the cells' species.
        tokens: longest sentence, scaling, `<cls>`.

    Returns:
        (tokens_T int32, offsets int64[N+1]): row i holds tokens_T[offsets[i] : offsets[i + 1]].
    """
    num_rows = len(indptr) - 1
    low = max(1, int(len(genes.tokens) - 1).bit_length())
    divide = int(tokens.scaling == "divide")
    cls = CLS if tokens.cls else -1
    most = tokens.max_len - int(tokens.cls)
    keys = np.empty(int(np.diff(indptr[::STRIP_CELLS], append=indptr[-1]).max(initial=0)), dtype=np.uint64)
    offsets = np.empty(STRIP_CELLS + 1, dtype=np.int64)
    value = np.empty(1)
    out = np.empty(int(np.minimum(np.diff(indptr), most).sum()) + num_rows * int(tokens.cls), dtype=np.int32)
    out_offsets = np.zeros(num_rows + 1, dtype=np.int64)
    fixed = (position_G, genes.medians, low, divide)
    for a in range(0, num_rows, STRIP_CELLS):  # a strip's keys stay in the processor's cache from packing to unpacking
        b = min(a + STRIP_CELLS, num_rows)
        _pack(data, indices, indptr[a : b + 1], *fixed, value, keys, offsets)
        ends = offsets[: b - a + 1].tolist()
        for lo, hi in pairwise(ends):
            keys[lo:hi].sort()
        _unpack(
            data,
            indices,
            indptr[a : b + 1],
            *fixed,
            keys,
            offsets,
            genes.tokens,
            cls,
            most,
            out,
            out_offsets[a : b + 1],
        )
    return out[: out_offsets[-1]], out_offsets
