"""How fast a device multiplies matrices, measured."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch

# Products [rows, inner] @ [inner, columns] that training has: feed-forward blocks of gemma3-nano,
# 270m and 1b, and a block of an output layer. A GPU needs more rows to show what it can do.
_CPU_SHAPES = ((4096, 256, 1024), (1024, 640, 2048), (1024, 1152, 6912), (512, 1152, 16_384))
_GPU_SHAPES = ((8192, 1152, 6912), (8192, 2048, 8192), (8192, 8192, 8192))
_PEAK_SECONDS = 0.4
# To compare precisions: large enough to tell, and half a second where bf16 is emulated.
_COMPARED_SHAPE = (256, 1024, 1024)
_COMPARED_SECONDS = 0.02
_FEWEST_RUNS = 3
# CPUs without instructions for bf16 multiply it at a half to a fiftieth of the speed of fp32, those
# with them at two to eight times. Less than this is not worth the smaller precision.
_WORTHWHILE_SPEEDUP = 1.5


def measure_matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the fastest matrix product that training has: the device's peak.

    Each shape runs for its share of the time; its fastest run counts, so a machine that does other
    things now and then is measured alike. On a CPU it is the peak of this process's threads.

    Args:
        device: where to multiply.
        dtype: of the factors, such as torch.bfloat16.
    """
    shapes = _GPU_SHAPES if device.type == "cuda" else _CPU_SHAPES
    peak = 0.0
    for shape in shapes:
        # Where one product takes so long, the smaller ones before it have told enough.
        if peak == 0 or 2 * math.prod(shape) / peak < _PEAK_SECONDS:
            flops = _matrix_flops(shape, device, dtype, _PEAK_SECONDS / len(shapes))
            peak = max(peak, flops)
    return peak


@functools.cache
def prefers_bf16(device: torch.device) -> bool:
    """Says whether a device multiplies bf16 so much faster than fp32 that it should.

    GPUs are asked; CPUs are measured, since neither their name nor their instructions tell.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    fp32, bf16 = 0.0, 0.0
    for _ in range(5):  # by turns, so that what else the machine does slows both
        fp32 = max(fp32, _matrix_flops(_COMPARED_SHAPE, device, torch.float32, _COMPARED_SECONDS))
        bf16 = max(bf16, _matrix_flops(_COMPARED_SHAPE, device, torch.bfloat16, _COMPARED_SECONDS))
    return bf16 > _WORTHWHILE_SPEEDUP * fp32


def shortest_seconds(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Returns the shortest time that `work` takes, in seconds.

    Args:
        work: what to time; its first run, which may prepare things, does not count.
        device: where it computes; a GPU is waited for.
        budget: seconds to try for; there are at least three runs.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    begin = time.perf_counter()
    work()
    wait()
    shortest = float("inf")
    num_runs = 0
    while num_runs < _FEWEST_RUNS or time.perf_counter() - begin < budget:
        started = time.perf_counter()
        work()
        wait()
        shortest = min(shortest, time.perf_counter() - started)
        num_runs += 1
    return shortest


def _matrix_flops(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, budget: float
) -> float:
    """Returns the FLOP/s of the product of a shape."""
    rows, inner, columns = shape
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = shortest_seconds(lambda: torch.mm(a, b.T, out=out), device, budget)
    return 2 * math.prod(shape) / seconds
