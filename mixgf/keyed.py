"""Keyed randomness: stateless integer hashes, in numpy for data and in plain torch operations for dropout.

A draw is a pure function of its key (seed, epoch, visit of a cell, view, place), never of what was drawn before. So a cell
gets the same mask and the same dropout in any batch, on any worker, at any world size, and after any restart.

Shapes: T packed tokens, B cells, C channels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

U64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def hashed(*parts: npt.ArrayLike) -> U64:
    """Hash integers (broadcast against each other) to 64 well mixed bits; the finaliser of splitmix64 per part."""
    h: U64 = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            x = (h ^ np.asarray(part).astype(np.int64).view(np.uint64)) + _GOLDEN
            x = (x ^ (x >> np.uint64(30))) * _M1
            x = (x ^ (x >> np.uint64(27))) * _M2
            h = x ^ (x >> np.uint64(31))
    return h


def uniform(*parts: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, one per key."""
    return (hashed(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def dropout_keys(*parts: npt.ArrayLike) -> Tensor:
    """Dropout keys, int32, one per token: pass (seed, epoch, visit_T, view_T, position_T)."""
    return torch.from_numpy((hashed(*parts) >> np.uint64(32)).astype(np.uint32).view(np.int32))


def dropped(keys_T: Tensor, site: int, num_channels: int, chance16: int) -> Tensor:
    """Which of C channels of every token are dropped at one site of the network, as bool (T, C).

    Each 32-bit hash serves two channels with 16 bits each. `chance16` is the probability in units of 2**-16.
    Integer arithmetic wraps around; torch.compile fuses all of it.
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
    """The signed form of the low 32 bits, because torch scalars of int32 are signed."""
    return (value & 0xFFFFFFFF) - (1 << 32) * ((value >> 31) & 1)
