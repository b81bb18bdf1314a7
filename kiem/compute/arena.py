"""Memory for weights, on large pages where the system gives them.

A token reads all weights. On pages of 4 kB the processor looks up so many addresses that reading
takes a sixth longer than on pages of 2 MB (docs/decisions.md).
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
_PIECE_BYTES = 64 << 20
_LINE_BYTES = 64


class Arena:
    """Lays tensors one after the other; the memory is given back when the last of them is gone."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns a new tensor on the CPU that begins with a cache line; it holds zeros."""
        num_bytes = math.prod(shape) * dtype.itemsize
        whole = -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        if whole > len(self._free):
            self._free = _map(max(_PIECE_BYTES, -(-whole // _PAGE_BYTES) * _PAGE_BYTES))
        taken, self._free = self._free[:num_bytes], self._free[whole:]
        return taken.view(dtype).view(shape)


def _map(num_bytes: int) -> Tensor:
    """Returns zeros, uint8 [num_bytes], on large pages; what is not touched takes no room."""
    mapped = mmap.mmap(-1, num_bytes + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Where the system has none, small pages do as well, only slower.
    with contextlib.suppress(OSError, AttributeError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE_BYTES
    return memory[start : start + num_bytes]
