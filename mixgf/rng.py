"""Counter-based random numbers: hashes of integers, in numpy for data and in torch for dropout.

A random number is a function of its key (seed, epoch, visit of a cell, view, position) and does not depend on earlier draws. A
cell therefore gets the same mask and the same dropout in any batch, on any worker, with any number of workers, and after a
restart.

Shapes: T packed tokens, B cells, C channels.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixgf.jit import jit

U64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def hashed(*parts: npt.ArrayLike, after: npt.ArrayLike = 0) -> U64:
    """64-bit hashes of integers, which are broadcast against each other; one finaliser of splitmix64 per part.

    `hashed(*a, *b)` equals `hashed(*b, after=hashed(*a))`.
    """
    h: U64 = np.asarray(after, dtype=np.uint64)
    for part in parts:
        h = _rounds(h, np.asarray(part).astype(np.int64).view(np.uint64))
    return h


@functools.lru_cache(4096)
def of_numbers(*numbers: int) -> U64:
    """`hashed` of plain integers, cached."""
    return hashed(*numbers)


def uniform(*parts: npt.ArrayLike, after: npt.ArrayLike = 0) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, one per key."""
    return (hashed(*parts, after=after) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def of_places(cells_B: U64, offsets_B1: npt.NDArray[np.int64]) -> U64:
    """`hashed(*key, position)` of every packed token (T,), from the cells' `hashed(*key)` (B,) and offsets (B + 1,)."""
    return _of_places(cells_B, offsets_B1)


def chance(hashes: U64, stream: int, fraction: float) -> npt.NDArray[np.bool_]:
    """`uniform(*key, stream) < fraction` from `hashed(*key)`."""
    return _chance(hashes, np.uint64(stream), fraction)


def dropout_keys(*parts: npt.ArrayLike) -> Tensor:
    """Dropout keys, int32, one per token: pass (seed, epoch, visit_T, view_T, position_T)."""
    return torch.from_numpy((hashed(*parts) >> np.uint64(32)).astype(np.uint32).view(np.int32))


def limit(fraction: float) -> np.uint64:
    """The integer limit for `draw53` that corresponds to `uniform(...) < fraction`."""
    return np.uint64(math.ceil(fraction * 2.0**53))


@jit
def mixed(h: np.uint64, part: np.uint64) -> np.uint64:
    """`hashed(*key, part)` from `hashed(*key)`, for compiled code."""
    x = (h ^ part) + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


@numba.vectorize(["uint64(uint64, uint64)"], cache=True)  # type: ignore[untyped-decorator]
def _rounds(h: np.uint64, part: np.uint64) -> np.uint64:
    return mixed(h, part)


@jit
def draw(h: np.uint64, stream: np.uint64) -> float:
    """`uniform(*key, stream)` from `hashed(*key)`, for compiled code."""
    return np.float64(draw53(h, stream)) * 2.0**-53


@jit
def draw53(h: np.uint64, stream: np.uint64) -> np.uint64:
    """The 53 bits of `draw`."""
    return mixed(h, stream) >> np.uint64(11)


@jit
def _of_places(cells_B: U64, offsets_B1: npt.NDArray[np.int64]) -> U64:
    out = np.empty(offsets_B1[-1], dtype=np.uint64)
    for i in range(len(cells_B)):
        start = offsets_B1[i]
        for place in range(offsets_B1[i + 1] - start):
            out[start + place] = mixed(cells_B[i], np.uint64(place))
    return out


@jit
def _chance(hashes: U64, stream: np.uint64, fraction: float) -> npt.NDArray[np.bool_]:
    out = np.empty(len(hashes), dtype=np.bool_)
    for i in range(len(hashes)):
        out[i] = draw(hashes[i], stream) < fraction
    return out


def dropped(keys_T: Tensor, site: int, num_channels: int, chance16: int) -> Tensor:
    """The channels of every token that are dropped at one site of the network, bool (T, C).

    Each 32-bit hash serves two channels with 16 bits each. Integer arithmetic wraps around.

    Args:
        keys_T: Of the tokens, from `dropout_keys`.
        site: Number of the dropout layer.
        num_channels: C.
        chance16: Probability in units of 2**-16.
    """
    half = (num_channels + 1) // 2
    token = _mix(keys_T ^ _int32(site * 0x632BE5AB + 0x2545F491))
    channel = _mix(torch.arange(half, dtype=torch.int32, device=keys_T.device) ^ _int32(site * 0x85157AF5 + 0x1B873593))
    bits = _mix(token[:, None] ^ channel[None, :])
    limit = -(2**31) + (chance16 << 16)
    return torch.cat([bits < limit, (bits << 16) < limit], dim=1)[:, :num_channels]


def _mix(x: Tensor) -> Tensor:
    """Two rounds of multiply and xor-shift on int32; shifts are logical."""
    x = x * _int32(0x7FEB352D)
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _int32(0x846CA68B)
    return x ^ ((x >> 15) & 0x1FFFF)


def _int32(value: int) -> int:
    """The low 32 bits as a signed integer, since torch has signed int32 only."""
    return (value & 0xFFFFFFFF) - (1 << 32) * ((value >> 31) & 1)
