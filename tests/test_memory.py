"""What counts as memory of the program, what it gives back, and who says that there is none."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from kiem.compute.memory import is_out_of_memory
from kiem.data.chunks import Chunks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is resident")
CUDA = "CUDA error: "
NCCL = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO), "
SHARED_MEMORY = "out of resource: triton_mm Required: 327680 Hardware limit:232448 Reducing block "
# What libraries say, and whether it is about the memory of the device or the machine.
REFUSALS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    (MemoryError(), True),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        True,
    ),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."), True),
    (RuntimeError("std::bad_alloc"), True),
    (RuntimeError("could not create a primitive"), True),
    (RuntimeError(f"{CUDA}CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
    (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `create`"), True),
    (
        torch.AcceleratorError(f"{CUDA}out of memory\nSearch for `cudaErrorMemoryAllocation' in"),
        True,
    ),
    (RuntimeError("CUDA driver error: out of memory"), True),
    (RuntimeError("Triton Error [CUDA]: out of memory"), True),
    (RuntimeError(f"{NCCL}NCCL version 2.28.9\nLast error:\nCuda failure 2 'out of memory'"), True),
    (RuntimeError(f"{NCCL}NCCL version 2.28.9\nLast error:\nCuda failure 999 'unknown'"), False),
    (torch.AcceleratorError(f"{CUDA}an illegal memory access was encountered"), False),
    (RuntimeError(f"{CUDA}CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (RuntimeError(f"No valid triton configs. OutOfMemoryError: {SHARED_MEMORY}"), False),
    (torch.OutOfMemoryError(SHARED_MEMORY), False),
]
NUM_BYTES = 64_000_000
# Frees every other one of many tensors, so that nothing at the end of the memory is free.
GIVE_BACK = """
import re
import torch
from kiem.compute.memory import give_back_free_memory, keep_freed_memory

def resident_bytes():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])

keep_freed_memory()
tensors = [torch.ones(1_000_000) for _ in range(100)]
before = resident_bytes()
del tensors[::2]
kept = resident_bytes()
give_back_free_memory()
print(before - kept, before - resident_bytes())
"""


@pytest.mark.parametrize(("error", "expected"), REFUSALS, ids=lambda value: str(value)[:40])
def test_refusals_of_memory_are_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    # As torch.compile raises them, and as an error of Python's that follows from it.
    assert is_out_of_memory(InductorError(error, None)) == expected
    failed = BackendCompilerFailed(repr, InductorError(error, None), None)
    assert is_out_of_memory(failed) == expected
    try:
        raise KeyError("weights") from error
    except KeyError as other:
        assert is_out_of_memory(other) == expected


def test_a_refusal_that_was_dealt_with_does_not_count() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise RuntimeError("the file is damaged") from None
    except RuntimeError as error:
        assert not is_out_of_memory(error)


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[mmap.mmap]:
    path = tmp_path / "shard"
    path.write_bytes(bytes(NUM_BYTES))
    with path.open("rb") as file:
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def mapped_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssFile:\s+(\d+)", status)
    assert found
    return 1024 * int(found[1])


def test_chunks_that_were_read_do_not_count_as_memory(shard: mmap.mmap) -> None:
    rows = np.frombuffer(shard, np.int32).reshape(-1, 500)
    chunks = Chunks([rows], np.array([0]), len(rows), 500, [shard])
    before = mapped_bytes()
    total = 0
    for start in range(0, len(rows), 1000):
        total += int(chunks.read(np.arange(start, start + 1000)).sum())
    assert total == 0
    assert mapped_bytes() - before < NUM_BYTES / 8
    assert rows.sum() == 0  # still there, and now it counts
    assert mapped_bytes() - before > NUM_BYTES / 2


def test_free_memory_is_kept_and_given_back(tmp_path: Path) -> None:
    """200 of 400 MB, in pieces between others."""
    program = tmp_path / "give_back.py"
    program.write_text(GIVE_BACK)
    done = run_script(program, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    kept, given_back = map(int, done.stdout.split())
    assert kept < 20e6
    assert given_back > 150e6


def test_chunks_are_read_ahead(shard: mmap.mmap, tmp_path: Path) -> None:
    """The system has them in its cache though nobody has read them since it forgot them."""
    rows = np.frombuffer(shard, np.int32).reshape(-1, 500)
    chunks = Chunks([rows], np.array([0]), len(rows), 500, [shard])
    numbers = np.arange(0, len(rows), 997)
    with (tmp_path / "shard").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if all(cached(rows[number]) for number in numbers):
        pytest.skip("this file system keeps everything in memory")
    chunks.read_ahead(numbers)
    ends = time.monotonic() + 60
    while not all(cached(rows[number]) for number in numbers):
        assert time.monotonic() < ends
        time.sleep(0.1)


def cached(row: np.ndarray) -> bool:
    """Returns whether the system has all pages of a row of a mapped file in its cache."""
    start = row.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = row.ctypes.data + row.nbytes - start
    found = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
    size = ctypes.c_size_t(num_bytes)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), size, found) == 0
    return all(page & 1 for page in found)
