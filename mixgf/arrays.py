"""Names for types of NumPy arrays, and arrays that Arrow and compiled functions share.

Shapes are in the suffixes of variables: `rank_G` has one value per gene.
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

T = TypeVar("T", bound=np.generic)
_POOL = pa.default_memory_pool()

Floats = npt.NDArray[np.floating]
"""Any floating type; the docstring says which."""
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Integers = npt.NDArray[np.signedinteger]
"""Any signed integer type."""
Bools = npt.NDArray[np.bool_]
Names = npt.NDArray[np.str_]
Cells = npt.NDArray[np.int64]
"""Numbers of cells in a corpus."""


def read_only(values: npt.NDArray[T]) -> npt.NDArray[T]:
    """A view that cannot be written to, as arrays of Arrow cannot: compiled functions are compiled once for both."""
    view = values.view()
    view.flags.writeable = False
    return view


def empty(length: int, dtype: type[T]) -> npt.NDArray[T]:
    """An array from Arrow's memory pool, which keeps freed memory for the next block.

    NumPy gives arrays of this size back to the system, which then clears the memory of every new one.
    """
    buffer = pa.allocate_buffer(length * np.dtype(dtype).itemsize, memory_pool=_POOL)
    found: npt.NDArray[Any] = np.frombuffer(buffer, dtype)
    return found
