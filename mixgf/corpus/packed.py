"""Packed sentences: the tokens of several cells in one array, without padding, and the offset of each cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Packed = tuple[I32, I64]
"""Tokens (T,) and offsets (B + 1,): cell i has tokens[offsets[i] : offsets[i + 1]]."""


def token_positions(offsets_B1: I64) -> I64:
    """Position of each token in its cell, (T,)."""
    out_T = np.arange(offsets_B1[-1])
    out_T -= np.repeat(offsets_B1[:-1], np.diff(offsets_B1))
    return out_T


def offsets_of(lengths_B: npt.NDArray[Any]) -> I64:
    """Offsets (B + 1,) of packed cells of these lengths; the last is the number of tokens."""
    offsets_B1 = np.zeros(len(lengths_B) + 1, dtype=np.int64)
    np.cumsum(lengths_B, out=offsets_B1[1:])
    return offsets_B1


def truncate(tokens_T: I32, offsets_B1: I64, max_len: int) -> tuple[I32, I64]:
    """Packed sentences cut to their first `max_len` tokens; 0 = not cut."""
    lengths_B = np.diff(offsets_B1)
    if max_len <= 0 or lengths_B.max(initial=0) <= max_len:
        return tokens_T, offsets_B1
    return tokens_T[token_positions(offsets_B1) < max_len], offsets_of(np.minimum(lengths_B, max_len))


def keep_tokens(sentences: Packed, keep_T: npt.NDArray[np.bool_]) -> Packed:
    """Packed sentences with only the tokens where `keep_T` is true; a sentence may become empty."""
    tokens_T, offsets = sentences
    kept = np.concatenate([[0], np.cumsum(keep_T)])
    return tokens_T[keep_T], kept[offsets].astype(np.int64)
