"""Moved here from mixgf/dataset.py, mixgf/views.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Packed = tuple[I32, I64]
"""Tokens (T,) and offsets (B + 1,)."""


def positions(offsets_B1: I64) -> I64:
    """Position of every packed token in its cell, (T,)."""
    out_T = np.arange(offsets_B1[-1])
    out_T -= np.repeat(offsets_B1[:-1], np.diff(offsets_B1))
    return out_T


def offsets_of(lengths_B: npt.NDArray[Any]) -> I64:
    """Where cells of these lengths begin when one lies after the other, and how many tokens there are, (B + 1,)."""
    offsets_B1 = np.zeros(len(lengths_B) + 1, dtype=np.int64)
    np.cumsum(lengths_B, out=offsets_B1[1:])
    return offsets_B1


def cut(tokens_T: I32, offsets_B1: I64, max_len: int) -> tuple[I32, I64]:
    """Packed sentences cut to their first `max_len` tokens; 0 = as they are."""
    lengths_B = np.diff(offsets_B1)
    if max_len <= 0 or lengths_B.max(initial=0) <= max_len:
        return tokens_T, offsets_B1
    return tokens_T[positions(offsets_B1) < max_len], offsets_of(np.minimum(lengths_B, max_len))


def select(sentences: Packed, keep_T: npt.NDArray[np.bool_]) -> Packed:
    """Sentences with only the tokens that are kept; a sentence may become empty."""
    tokens_T, offsets = sentences
    kept = np.concatenate([[0], np.cumsum(keep_T)])
    return tokens_T[keep_T], kept[offsets].astype(np.int64)
