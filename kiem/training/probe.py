"""What a device can do, measured, and what a token costs, calculated: the two halves of MFU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kiem.model.presets import Gemma3Config
from kiem.model.product import multiply_into

# Products [rows, inner] @ [inner, columns] that training has: feed-forward blocks of gemma3-nano,
# 270m and 1b, and a block of an output layer. A GPU needs more rows to show what it can do.
_CPU_SHAPES = ((4096, 256, 1024), (1024, 640, 2048), (1024, 1152, 6912), (512, 1152, 16_384))
_GPU_SHAPES = ((8192, 1152, 6912), (8192, 2048, 8192), (8192, 8192, 8192))
_PROBE_SECONDS = 0.4
_FEWEST_RUNS = 3


def measure_matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the fastest matrix product that training has: the device's peak.

    Each shape runs for its share of a second; its fastest run counts, so a machine that does other
    things now and then is measured alike. On a CPU it is the peak of this process's threads.

    Args:
        device: where to multiply.
        dtype: of the factors, such as torch.bfloat16.
    """
    shapes = _GPU_SHAPES if device.type == "cuda" else _CPU_SHAPES
    best = 0.0
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        seconds = shortest_seconds(
            lambda a=a, b=b, out=out: multiply_into(out, a, b.T),  # type: ignore[misc]
            device,
            _PROBE_SECONDS / len(shapes),
        )
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


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


def flops_per_token(config: Gemma3Config, chunk_size: int) -> float:
    """Returns the FLOP that training takes for a token, forward and backward; no recomputation.

    6 for every parameter, the tied embedding once, since only its use as output layer multiplies;
    and 12 x query width for every key that a token looks at (PaLM, arXiv:2204.02311, appendix B,
    which counts chunk_size keys everywhere). Here keys are what causal attention and the sliding
    window leave, on average over a chunk; documents that end within it are not taken into account.

    Args:
        config: the model's shape.
        chunk_size: tokens that attend to each other.
    """
    query_width = config.num_attention_heads * config.head_dim
    window = min(config.sliding_window, chunk_size)
    keys_sliding = window - window * (window - 1) / 2 / chunk_size
    keys_full = (chunk_size + 1) / 2
    keys = sum(
        keys_sliding if config.is_sliding(layer) else keys_full
        for layer in range(config.num_hidden_layers)
    )
    return 6 * config.num_parameters() + 12 * query_width * keys
