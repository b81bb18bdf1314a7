"""How fast a model reads and writes on this machine."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kiem.compute.memory import peak_memory_bytes
from kiem.core.files import format_bytes, write_json
from kiem.inference.engine import Engine, Request
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import Sampling

_PROMPT_TOKENS = 512
_NEW_TOKENS = 64
_REPETITIONS = 3
_COPY_BYTES = 1 << 29


@dataclass(frozen=True)
class Speed:
    """Figures for one batch size: medians and percentiles over the repetitions.

    Attributes:
        prefill_tokens_per_second: prompt tokens read, over all sequences.
        decode_tokens_per_second: tokens written after the first, over all sequences.
        ttft_ms: time to first token.
        itl_ms: time between tokens, at the percentiles p50, p95 and p99.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    ttft_ms: float
    itl_ms: dict[str, float]


def run_benchmark(
    loaded: LoadedModel, json_file: Path | None, name: str, console: Console
) -> dict[str, Any]:
    """Measures, prints a table and writes JSON when asked.

    Args:
        loaded: the model.
        json_file: where to write the figures, or None.
        name: what to call the model in the table.
        console: where the table goes.

    Returns:
        The figures: `batch_1` and `batch_8` (each a Speed), `memory_bytes`, `load_seconds` and
        `bandwidth_share`, the bytes of weights read per second in decoding with batch 1 over the
        bytes that a plain copy reads per second.
    """
    console.print(
        f"{_PROMPT_TOKENS} prompt tokens, {_NEW_TOKENS} new ones, greedy; one warm-up, then the "
        f"median of {_REPETITIONS} runs"
    )
    speeds = {}
    for batch_size in (1, 8):
        with console.status(f"batch of {batch_size}"):
            speeds[batch_size] = measure(loaded, batch_size)
    # All weights are read for each token, the embedding as the output layer.
    weights = [*loaded.model.parameters(), *loaded.model.buffers()]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    read_rate = weight_bytes * speeds[1].decode_tokens_per_second
    device = loaded.model.model.norm.weight.device
    figures: dict[str, Any] = {
        "batch_1": asdict(speeds[1]),
        "batch_8": asdict(speeds[8]),
        "memory_bytes": peak_memory_bytes(device),
        "load_seconds": loaded.load_seconds,
        "bandwidth_share": read_rate / copy_bytes_per_second(device),
    }
    table = Table("", "batch 1", "batch 8", title=name, title_justify="left")
    for label, field, unit in (
        ("prefill", "prefill_tokens_per_second", "tokens/s"),
        ("decode", "decode_tokens_per_second", "tokens/s"),
        ("time to first token", "ttft_ms", "ms"),
    ):
        table.add_row(label, *(f"{getattr(s, field):,.1f} {unit}" for s in speeds.values()))
    for percentile in ("p50", "p95", "p99"):
        cells = (f"{speed.itl_ms[percentile]:,.1f} ms" for speed in speeds.values())
        table.add_row(f"between tokens, {percentile}", *cells)
    console.print(table)
    console.print(
        f"peak memory {format_bytes(figures['memory_bytes'])}, loaded in "
        f"{loaded.load_seconds:.1f} s, {figures['bandwidth_share']:.0%} of the memory bandwidth"
    )
    if json_file is not None:
        write_json(json_file, figures)
    return figures


def measure(loaded: LoadedModel, batch_size: int) -> Speed:
    """Returns the speed with `batch_size` sequences at a time."""
    generator = torch.Generator().manual_seed(0)
    size = (_PROMPT_TOKENS,)
    prompt = torch.randint(4, loaded.model.config.vocab_size, size, generator=generator).tolist()
    greedy = Sampling(temperature=0, repetition_penalty=1)
    # A step that begins requests also writes the next token of each, so prefill is timed by itself.
    prefill, whole = (Request(prompt, new, greedy, 0) for new in (1, _NEW_TOKENS))
    max_tokens = _PROMPT_TOKENS + _NEW_TOKENS
    engine = Engine(loaded.model, -1, max_requests=batch_size, max_tokens=max_tokens)
    first: list[float] = []
    between: list[float] = []
    for repetition in range(_REPETITIONS + 1):
        started = time.perf_counter()
        for _ in range(batch_size):
            engine.add(prefill)
        engine.step()
        prefill_seconds = time.perf_counter() - started
        for _ in range(batch_size):
            engine.add(whole)
        intervals = []
        while engine.num_running or engine.num_waiting:
            clock = time.perf_counter()
            engine.step()
            intervals.append(time.perf_counter() - clock)
        if repetition > 0:  # the first one is the warm-up
            first.append(prefill_seconds)
            between += intervals[1:]
    prefill_seconds = float(np.median(first))
    p50, p95, p99 = (float(value) * 1000 for value in np.percentile(between, [50, 95, 99]))
    return Speed(
        prefill_tokens_per_second=_PROMPT_TOKENS * batch_size / prefill_seconds,
        decode_tokens_per_second=batch_size * 1000 / p50,
        ttft_ms=prefill_seconds * 1000,
        itl_ms={"p50": p50, "p95": p95, "p99": p99},
    )


def copy_bytes_per_second(device: torch.device) -> float:
    """Returns how many bytes a plain sum over memory reads per second, the best of five."""
    data = torch.ones(_COPY_BYTES // 4, device=device)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum().item()
        best = max(best, _COPY_BYTES / (time.perf_counter() - started))
    return best
