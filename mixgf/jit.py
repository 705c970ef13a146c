"""How kernels are compiled: once per machine, kept on disk, without Python's lock while they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])
jit: Callable[[F], F] = numba.njit(cache=True, nogil=True)
