"""The numba decorator of all compiled functions: cached on disk, and run without Python's global lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])
jit: Callable[[F], F] = numba.njit(cache=True, nogil=True)
