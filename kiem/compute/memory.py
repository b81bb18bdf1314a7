"""How much memory this process has used, what becomes of what it frees, and what fits a cache."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1
_PAGES_OF_ITS_OWN_BYTES = 1 << 16
# What allocators say: those of the C++ library, of torch for CPUs, of oneDNN.
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
    """Tells glibc's malloc to keep what is freed for the next use, instead of giving it back.

    By default it asks the system for every large tensor anew, whose pages are then cleared and
    mapped one by one at first touch: in training on a CPU that costs as much as the optimizer.
    Elsewhere than in glibc this does nothing. See mallopt(3).
    """
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        _mallopt(option, _LARGEST_INT)


def give_back_free_memory() -> None:
    """Gives back what `keep_freed_memory` has kept; for when memory was tried out.

    What is allocated in between would leave gaps too small for use, which took 100 MB and more.
    """
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@contextlib.contextmanager
def held_to_the_end() -> Iterator[None]:
    """Gives what is allocated in this block memory of its own; for what `keep_freed_memory` knows.

    Between memory that comes and goes it would leave gaps that fit nothing: 3 of 21 GB in a
    training of gemma3-1b.
    """
    _mallopt(_M_MMAP_THRESHOLD, _PAGES_OF_ITS_OWN_BYTES)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT)


def _mallopt(option: int, value: int) -> None:
    if (library := _glibc()) is not None:
        library.mallopt(option, value)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
