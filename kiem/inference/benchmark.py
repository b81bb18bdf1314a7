"""Benchmark of a model's speed on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kiem.compute.memory import peak_memory_bytes
from kiem.core.files import format_bytes, write_json
from kiem.inference.engine import Engine, Request
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import SamplingParams

_REPETITIONS = 3
# Prompt tokens and new ones; the first sizes that end in time are taken.
_SIZES = ((512, 64), (256, 32), (128, 16), (64, 8))
_COPY_BYTES = 1 << 29


def run_benchmark(
    loaded: LoadedModel,
    json_file: Path | None,
    name: str,
    console: Console,
    seconds: float = 100.0,
) -> dict[str, Any]:
    """Measures the speed of a model, prints a table and writes `json_file` if there is one.

    On a slow machine it takes shorter texts and fewer repetitions, so as to end in some `seconds`.

    Returns:
        The figures: `batch_1` and `batch_8`, each as `_measure` returns it, `memory_bytes`,
        `load_seconds` and `bandwidth_share`, the bytes of weights read per second in decoding with
        batch 1 over the bytes that a plain sum reads per second.
    """
    figures: dict[str, Any] = {}
    with Progress(console=console, transient=True) as progress:
        for batch_size in (1, 8):
            steps = progress.track(range(_REPETITIONS), description=f"batch of {batch_size}")
            figures[f"batch_{batch_size}"] = _measure(loaded, batch_size, seconds / 2, steps)
    # All weights are read for each token, the embedding as the output layer.
    weights = [*loaded.model.parameters(), *loaded.model.buffers()]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    read_rate = weight_bytes * figures["batch_1"]["decode_tokens_per_second"]
    device = loaded.model.model.norm.weight.device
    figures["memory_bytes"] = peak_memory_bytes(device)
    figures["load_seconds"] = loaded.load_seconds
    figures["bandwidth_share"] = read_rate / copy_bytes_per_second(device)
    _show(figures, name, console)
    if json_file is not None:
        write_json(json_file, figures)
    return figures


def _show(figures: dict[str, Any], name: str, console: Console) -> None:
    batches = figures["batch_1"], figures["batch_8"]
    table = Table("", "batch 1", "batch 8", title=name, title_justify="left")
    for label, field in (
        ("prompt tokens", "prompt_tokens"),
        ("new tokens, greedy", "new_tokens"),
        ("repetitions after a warm-up", "repetitions"),
    ):
        table.add_row(label, *(str(batch[field]) for batch in batches))
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
    num_prompt, num_new = _SIZES[0]
    if any(b["prompt_tokens"] < num_prompt or b["repetitions"] < _REPETITIONS for b in batches):
        console.print(
            f"To end in time, less was measured than {_REPETITIONS} repetitions with {num_prompt} "
            f"prompt tokens and {num_new} new ones."
        )
    console.print(
        f"peak memory {format_bytes(figures['memory_bytes'])}, loaded in "
        f"{figures['load_seconds']:.1f} s, {figures['bandwidth_share']:.0%} of the memory bandwidth"
    )


def _measure(
    loaded: LoadedModel, batch_size: int, seconds: float, repetitions: Iterable[int]
) -> dict[str, Any]:
    """Returns the figures for a batch: medians of rates over all its sequences, and latencies."""
    most = sum(_SIZES[0])
    engine = Engine(loaded.model, None, max_requests=batch_size, max_tokens=most)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, loaded.model.config.vocab_size, (most,), generator=generator).tolist()

    def run(num_prompt: int, num_new: int) -> tuple[float, list[float]]:
        """Returns the seconds of reading the prompts, and of each step after that."""
        params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=num_new)
        requests = [Request(ids[:num_prompt], params, seed=0)] * batch_size
        started = time.perf_counter()
        ends = [time.perf_counter() for index, _ in engine.stream(requests) if index == 0]
        steps = np.diff(ends).tolist()
        # The first step reads the prompts and then writes a token, as the others do.
        return max(1e-9, ends[0] - started - float(np.median(steps))), steps

    # A small run warms up and tells how long the others will take.
    num_prompt, num_new = _SIZES[-1]
    prompt_seconds, steps = run(num_prompt, num_new)
    token_seconds = prompt_seconds / num_prompt, float(np.median(steps))
    for num_prompt, num_new in _SIZES:
        expected = num_prompt * token_seconds[0] + num_new * token_seconds[1]
        if _REPETITIONS * expected < seconds:
            break
    if engine.device.type == "cuda":
        run(num_prompt, num_new)  # a size's first steps make its CUDA graphs
    deadline = time.perf_counter() + seconds
    runs = []
    for _ in repetitions:
        runs.append(run(num_prompt, num_new))
        if time.perf_counter() > deadline:
            break
    prefill_seconds = float(np.median([prompt for prompt, _ in runs]))
    between = [step for _, steps in runs for step in steps]
    p50, p95, p99 = (float(value) * 1000 for value in np.percentile(between, [50, 95, 99]))
    return {
        "prompt_tokens": num_prompt,
        "new_tokens": num_new,
        "repetitions": len(runs),
        "prefill_tokens_per_second": num_prompt * batch_size / prefill_seconds,
        "decode_tokens_per_second": batch_size * 1000 / p50,
        "ttft_ms": prefill_seconds * 1000,
        "itl_ms": {"p50": p50, "p95": p95, "p99": p99},
    }


def copy_bytes_per_second(device: torch.device) -> float:
    """Returns how many bytes a plain sum over memory reads per second, the best of five."""
    data = torch.ones(_COPY_BYTES // 4, device=device)
    num_sums = 32 if device.type == "cuda" else 1  # so that starting and waiting hardly count
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        sums = [data.sum() for _ in range(num_sums)]
        sums[-1].item()
        best = max(best, num_sums * _COPY_BYTES / (time.perf_counter() - started))
    return best
