"""Names for types of NumPy arrays. Shapes are in the suffixes of variables: `rank_G` has one value per gene."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bound=np.generic)

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
