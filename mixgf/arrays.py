"""Names of array types."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Integers = npt.NDArray[np.signedinteger]
Bools = npt.NDArray[np.bool_]
Names = npt.NDArray[np.str_]
Cells = npt.NDArray[np.int64]
