"""Packed sentences as tensors for the encoder: no padding, one cell after the other.

Shapes: T packed tokens, B cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixgf import rng
from mixgf.corpus.packed import I32, I64, Packed
from mixgf.jit import jit


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sentences as tensors."""

    ids_T: Tensor
    """Token ids, int64."""
    offsets_B1: Tensor
    """Offsets of the cells, int32: cell i has tokens [offsets[i], offsets[i + 1])."""
    positions_T: Tensor
    """Position of each token in its cell, int64."""
    cells_B: Tensor
    """Global cell numbers, int64."""
    max_len: int
    """Tokens of the longest cell."""
    keys_T: Tensor | None = None
    """Key of each token's random dropout, int32 (T,); None = no dropout."""

    @property
    def num_cells(self) -> int:
        """Number of cells (B)."""
        return len(self.cells_B)

    @property
    def num_tokens(self) -> int:
        """Number of tokens (T)."""
        return len(self.ids_T)

    def truncate(self, max_len: int) -> Batch:
        """Batch with the first `max_len` tokens of every cell."""
        if self.max_len <= max_len:
            return self
        kept_T = self.positions_T < max_len
        offsets_B1 = torch.zeros_like(self.offsets_B1)
        torch.cumsum(self.offsets_B1.diff().clamp(max=max_len), 0, out=offsets_B1[1:])
        return replace(
            self, ids_T=self.ids_T[kept_T], offsets_B1=offsets_B1, positions_T=self.positions_T[kept_T], max_len=max_len,
            keys_T=None if self.keys_T is None else self.keys_T[kept_T],
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Batch:
        """Batch on a device; copies to a GPU are asynchronous, from pinned memory."""
        if torch.device(device).type == "cpu":
            return self
        return self._changed(lambda x: (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Batch in pinned memory, so that `to` only starts the copies to a GPU. Needs one."""
        return self._changed(torch.Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self, ids_T=change(self.ids_T), offsets_B1=change(self.offsets_B1), positions_T=change(self.positions_T),
            cells_B=change(self.cells_B), keys_T=None if self.keys_T is None else change(self.keys_T),
        )  # fmt: skip


def pack_batch(
    packs: list[Packed],
    cells: npt.ArrayLike,
    keys: npt.NDArray[np.uint64] | None = None,
    *,
    positions: list[I64] | None = None,
) -> Batch:
    """Join packed sentences to one `Batch`.

    Args:
        packs: tokens and offsets; several packs are several views of the same B cells, one after the other.
        cells: global numbers of the cells, (B,).
        keys: dropout key of each cell, `rng.hashed(seed, epoch, visits)`, (B,); the number of the pack is mixed in.
            None = no dropout.
        positions: position of each token in its cell, by pack, ascending within a cell; None = 0, 1, 2, ...
    """
    cells_B = np.asarray(cells, dtype=np.int64)
    num_cells, num_tokens = len(cells_B), sum(len(tokens_T) for tokens_T, _ in packs)
    ids_T, positions_T = np.empty(num_tokens, dtype=np.int64), np.empty(num_tokens, dtype=np.int64)
    offsets_B1 = np.zeros(num_cells * len(packs) + 1, dtype=np.int32)
    keys_T = np.empty(num_tokens if keys is not None else 0, dtype=np.int32)
    max_len, keys_B = 1, np.empty(0, dtype=np.uint64) if keys is None else keys
    for number, (tokens_T, offsets) in enumerate(packs):
        longest = _append_pack(tokens_T, offsets, keys_B, number, ids_T, positions_T, offsets_B1, keys_T)
        max_len = max(max_len, int(longest))
    if positions is not None:
        np.concatenate(positions, out=positions_T)
    return Batch(
        ids_T=torch.from_numpy(ids_T),
        offsets_B1=torch.from_numpy(offsets_B1),
        positions_T=torch.from_numpy(positions_T),
        cells_B=torch.from_numpy(np.tile(cells_B, len(packs))),
        max_len=max_len,
        keys_T=None if keys is None else torch.from_numpy(keys_T),
    )


@jit
def _append_pack(  # noqa: PLR0917 (compiled)
    tokens_T: I32,
    offsets: I64,
    keys_B: npt.NDArray[np.uint64],
    number: int,
    ids_T: I64,
    positions_T: I64,
    offsets_B1: I32,
    keys_T: I32,
) -> np.int64:
    """Write pack number `number` behind the packs before it; returns the length of its longest cell."""
    num_cells = len(offsets) - 1
    base, longest = np.int64(offsets_B1[number * num_cells]), np.int64(1)
    for i in range(num_cells):
        start, stop = base + offsets[i], base + offsets[i + 1]
        longest = max(longest, stop - start)
        offsets_B1[number * num_cells + i + 1] = stop
        ids_T[start:stop] = tokens_T[offsets[i] : offsets[i + 1]]
        places = positions_T[start:stop]
        for t in range(len(places)):
            places[t] = t
        if len(keys_B):
            key, keys = rng.mixed(keys_B[i], np.uint64(number)), keys_T[start:stop]
            for t in range(len(keys)):
                keys[t] = np.int32(rng.mixed(key, np.uint64(t)) >> np.uint64(32))
    return longest


def split_micro_batches(lengths: npt.NDArray[np.int32], max_tokens: int) -> list[slice]:
    """Cut consecutive cells into micro batches of at most `max_tokens` tokens.

    A longer cell is a micro batch of its own. There is at least one slice, which is empty without cells.
    """
    cuts, used = [0], 0
    for i, length in enumerate(lengths.tolist()):
        if used and used + length > max_tokens:
            cuts.append(i)
            used = 0
        used += length
    cuts.append(len(lengths))
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]
