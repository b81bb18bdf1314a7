"""NumPy arrays to Arrow and back, without a copy.

pyarrow's own functions for this import pandas where it is installed, which takes a third of a
second.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def from_numpy(values: np.ndarray) -> pa.Array:
    """Returns a one-dimensional array as an Arrow array; nothing in it is null."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)


def to_numpy(array: pa.Array) -> np.ndarray:
    """Returns an Arrow array of numbers, none of them null, as a view into its memory."""
    assert array.null_count == 0
    dtype = np.dtype(array.type.to_pandas_dtype())
    data = array.buffers()[1]
    if data is None:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize)
