"""Benchmark of a model's speed on this machine."""

from __future__ import annotations

import time
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
from kiem.inference.sampling import SamplingParams

_PROMPT_TOKENS = 512
_NEW_TOKENS = 64
_REPETITIONS = 3
_COPY_BYTES = 1 << 29


def run_benchmark(
    loaded: LoadedModel, json_file: Path | None, name: str, console: Console
) -> dict[str, Any]:
    """Measures the speed of a model, prints a table and writes `json_file` if there is one.

    Returns:
        The figures: `batch_1` and `batch_8`, each as `_measure` returns it, `memory_bytes`,
        `load_seconds` and `bandwidth_share`, the bytes of weights read per second in decoding with
        batch 1 over the bytes that a plain sum reads per second.
    """
    console.print(
        f"{_PROMPT_TOKENS} prompt tokens, {_NEW_TOKENS} new ones, greedy; one warm-up, then the "
        f"median of {_REPETITIONS} runs"
    )
    figures: dict[str, Any] = {}
    for batch_size in (1, 8):
        with console.status(f"batch of {batch_size}"):
            figures[f"batch_{batch_size}"] = _measure(loaded, batch_size)
    # All weights are read for each token, the embedding as the output layer.
    weights = [*loaded.model.parameters(), *loaded.model.buffers()]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    read_rate = weight_bytes * figures["batch_1"]["decode_tokens_per_second"]
    device = loaded.model.model.norm.weight.device
    figures["memory_bytes"] = peak_memory_bytes(device)
    figures["load_seconds"] = loaded.load_seconds
    figures["bandwidth_share"] = read_rate / copy_bytes_per_second(device)

    batches = figures["batch_1"], figures["batch_8"]
    table = Table("", "batch 1", "batch 8", title=name, title_justify="left")
    for label, field, unit in (
        ("prefill", "prefill_tokens_per_second", "tokens/s"),
        ("decode", "decode_tokens_per_second", "tokens/s"),
        ("time to first token", "ttft_ms", "ms"),
    ):
        table.add_row(label, *(f"{batch[field]:,.1f} {unit}" for batch in batches))
    for percentile in ("p50", "p95", "p99"):
        cells = (f"{batch['itl_ms'][percentile]:,.1f} ms" for batch in batches)
        table.add_row(f"between tokens, {percentile}", *cells)
    console.print(table)
    console.print(
        f"peak memory {format_bytes(figures['memory_bytes'])}, loaded in "
        f"{loaded.load_seconds:.1f} s, {figures['bandwidth_share']:.0%} of the memory bandwidth"
    )
    if json_file is not None:
        write_json(json_file, figures)
    return figures


def _measure(loaded: LoadedModel, batch_size: int) -> dict[str, Any]:
    """Returns the figures for a batch: rates over all its sequences, and latencies."""
    generator = torch.Generator().manual_seed(0)
    size = (_PROMPT_TOKENS,)
    prompt = torch.randint(4, loaded.model.config.vocab_size, size, generator=generator).tolist()
    # A step that begins requests also writes the next token of each, so prefill is timed by itself.
    prefill, whole = (
        Request(
            prompt, SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=new), seed=0
        )
        for new in (1, _NEW_TOKENS)
    )
    max_tokens = _PROMPT_TOKENS + _NEW_TOKENS
    engine = Engine(loaded.model, None, max_requests=batch_size, max_tokens=max_tokens)
    first: list[float] = []
    between: list[float] = []
    for repetition in range(_REPETITIONS + 1):
        started = time.perf_counter()
        list(engine.stream([prefill] * batch_size))
        prefill_seconds = time.perf_counter() - started
        # The first step gives each sequence two tokens, the others one.
        outputs = engine.stream([whole] * batch_size)
        steps = [time.perf_counter() for index, _ in outputs if index == 0][1:]
        if repetition > 0:  # the first one is the warm-up
            first.append(prefill_seconds)
            between += np.diff(steps).tolist()
    prefill_seconds = float(np.median(first))
    p50, p95, p99 = (float(value) * 1000 for value in np.percentile(between, [50, 95, 99]))
    return {
        "prefill_tokens_per_second": _PROMPT_TOKENS * batch_size / prefill_seconds,
        "decode_tokens_per_second": batch_size * 1000 / p50,
        "ttft_ms": prefill_seconds * 1000,
        "itl_ms": {"p50": p50, "p95": p95, "p99": p99},
    }


def copy_bytes_per_second(device: torch.device) -> float:
    """Returns how many bytes a plain sum over memory reads per second, the best of five."""
    data = torch.ones(_COPY_BYTES // 4, device=device)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum().item()
        best = max(best, _COPY_BYTES / (time.perf_counter() - started))
    return best
