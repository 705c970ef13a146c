"""The numba decorator of all compiled functions: cached on disk, and run without Python's global lock; numba's threads; one machine instruction."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba import types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile a function; without a cache where neither its folder nor the user's cache folder can be written."""
    try:
        return cast("F", numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # "no locator available": a read-only installation and no home
        return cast("F", numba.njit(nogil=True)(function))


def start_threads() -> None:
    """Start the threads of numba's parallel functions, which scanpy and umap have, in a way that leaves those of torch alone.

    Over OpenMP, the thread that calls the first parallel function gets as many OpenMP threads as there are cores. Torch takes its
    number of threads from there once it has worked in that thread, whatever `torch.set_num_threads` said before, and float32 sums
    depend on it. So a thread of its own starts them.
    """
    starter = threading.Thread(target=numba.get_num_threads, name="mixgf-numba")
    starter.start()
    starter.join()


@intrinsic  # type: ignore[untyped-decorator]
def trailing_zeros(_: Any, word: Any) -> tuple[Any, Callable[..., Any]]:
    """Zero bits below the lowest set bit of a uint64 that is not 0; for compiled functions."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

    return types.int64(word), generate
