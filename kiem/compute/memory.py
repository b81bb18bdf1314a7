"""Memory of this process: its peak, refusals, and what glibc's malloc does with freed memory."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1
_REFUSALS = (
    # Of the C++ library, of torch for CPUs, and of oneDNN.
    *("bad_alloc", "allocate memory", "not enough memory", "could not create a "),
    # Of CUDA's driver and runtime, which Triton and NCCL repeat; of cuBLAS, cuSOLVER and cuDNN.
    *("out of memory", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"),
    *("STATUS_ALLOC_FAILED", "ALLOCATION_FAILED"),
)
# A kernel that needs more shared memory than a GPU has: Triton's OutOfResources, of which
# torch.compile makes an OutOfMemoryError. Smaller passes do not help.
_TOO_LARGE_A_KERNEL = "out of resource"


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error is, or follows from, a refusal of memory on a GPU or a CPU."""
    chain = list(_causes(error))
    if any(_TOO_LARGE_A_KERNEL in str(cause) for cause in chain):
        return False
    return any(
        isinstance(cause, torch.OutOfMemoryError | MemoryError)
        or (isinstance(cause, RuntimeError) and any(text in str(cause) for text in _REFUSALS))
        for cause in chain
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, and those that it followed from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # torch.compile raises its errors "from None", and keeps the cause under a name of its own.
        inner = getattr(error, "inner_exception", None)
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or inner or context


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory this process has held: on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kibibytes


def forget_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory_bytes` begin anew on a GPU; a CPU's peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed for the next use, instead of giving it back to the system.

    By default glibc asks the system anew for every large tensor, whose pages are then cleared and
    mapped one by one: 5 % of a training step of gemma3-nano on a CPU. See mallopt(3).
    """
    if (library := _glibc()) is not None:
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            library.mallopt(option, _LARGEST_INT)


def give_back_free_memory() -> None:
    """Gives back what allocators keep of freed memory, before work with tensors of other sizes."""
    torch.cuda.empty_cache()  # nothing where CUDA is not used
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Returns the C library if it is glibc."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
