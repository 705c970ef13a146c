"""The numba decorator of all compiled functions: cached on disk, and run without Python's global lock; one machine instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])
jit: Callable[[F], F] = numba.njit(cache=True, nogil=True)


@intrinsic  # type: ignore[untyped-decorator]
def trailing_zeros(_: Any, word: Any) -> tuple[Any, Callable[..., Any]]:
    """Zero bits below the lowest set bit of a uint64 that is not 0; for compiled functions."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

    return types.int64(word), generate
