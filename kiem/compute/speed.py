"""How fast a device multiplies, and in which precision it should."""

from __future__ import annotations

import itertools
import math
import time

import torch

from kiem.core.errors import bad_option

# Products [rows, inner] @ [inner, columns] that training has: MLPs of gemma3-nano, 270m and 1b, and
# a block of an output layer. A GPU needs more rows to reach its peak.
_CPU_SHAPES = ((4096, 256, 1024), (1024, 640, 2048), (1024, 1152, 6912), (512, 1152, 16_384))
_GPU_SHAPES = ((8192, 1152, 6912), (8192, 2048, 8192), (8192, 8192, 8192))
_PEAK_SECONDS = 0.4


def measure_matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the fastest matrix product that training has: the device's peak.

    On a CPU it is the peak of this process's threads.
    """
    shapes = _GPU_SHAPES if device.type == "cuda" else _CPU_SHAPES
    seconds = _PEAK_SECONDS / len(shapes)
    end = time.perf_counter() + _PEAK_SECONDS
    peak = 0.0
    for shape in itertools.cycle(shapes):
        if peak and time.perf_counter() >= end:
            break
        # On slow devices the smaller shapes suffice, and take the time of the others.
        if peak == 0 or 2 * math.prod(shape) / peak < seconds:
            peak = max(peak, _matrix_flops(shape, device, dtype, seconds))
    return peak


def prefers_bf16(device: torch.device) -> bool:
    """Says whether a device has instructions that multiply bf16.

    x86 processors with them multiply bf16 at two to eight times the speed of fp32, those without at
    a half to a fiftieth. They are asked, not measured: what a run computes must not depend on what
    else the machine does. ARM processors have not been measured, and get fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # ATEN_CPU_CAPABILITY makes torch use fewer instructions than the processor has.
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return torch.cpu.get_capabilities()["avx512_bf16"]


def check_bf16(device: torch.device) -> None:
    """Checks that a GPU multiplies bf16 by itself; older ones do it in fp32, and slowly.

    Raises:
        UserError: it does not.
    """
    if device.type == "cuda" and not prefers_bf16(device):
        raise bad_option("--precision bf16", "this GPU has no bf16", "Use --precision fp32.")


def _matrix_flops(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seconds: float
) -> float:
    """Returns the FLOP/s of a product: the fastest run after a warm-up, within some seconds."""
    rows, inner, columns = shape
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)

    def run() -> float:
        started = time.perf_counter()
        torch.mm(a, b.T, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    end = time.perf_counter() + seconds
    run()
    times = [run()]
    while time.perf_counter() < end:
        times.append(run())
    return 2 * math.prod(shape) / min(times)
