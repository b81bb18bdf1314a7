"""How much memory this process has used, and what becomes of memory that it frees."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1


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
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        library.mallopt(option, _LARGEST_INT)
