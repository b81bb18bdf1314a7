"""Memory of this process: its peak, refusals, and what glibc's malloc does with freed memory."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1
# In the messages of the allocators of the C++ library, of torch for CPUs, and of oneDNN.
_REFUSALS = ("bad_alloc", "allocate memory", "not enough memory", "could not create a ")


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error is an allocator's refusal, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _REFUSALS)


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory this process has held: on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kibibytes


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed for the next use, instead of giving it back to the system.

    By default glibc asks the system anew for every large tensor, whose pages are then cleared and
    mapped one by one: 5 % of a training step of gemma3-nano on a CPU. See mallopt(3).
    """
    if (library := _glibc()) is not None:
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            library.mallopt(option, _LARGEST_INT)


def give_back_free_memory() -> None:
    """Gives back what `keep_freed_memory` has kept, before work with tensors of other sizes."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Returns the C library if it is glibc."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
