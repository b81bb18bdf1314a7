"""Ways of training: finished runs that differ only in their seed, against other such runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kiem.evaluation.significance import compare
from kiem.report.record import Record

# Options that change neither the weights nor what is measured at the end.
_WITHOUT_EFFECT = {
    *("seed", "dataset_path", "output_dir", "run_name", "resume", "plan", "gpu", "num_gpus"),
    *("eval_steps", "eval_chunks", "save_steps", "save_total_limit", "on_save_failure"),
    *("minimal_pairs", "language", "sample_prompt", "log_steps", "price"),
    *("trackers", "use_wandb", "wandb_project"),
}


def compare_ways(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Returns rows of a table: a way of training, its runs, mean bits per byte, the difference.

    The difference is that to the first way, with its standard error, from pairs of runs with the
    same seed. There are no rows unless at least two ways have finished runs.
    """
    ways: dict[tuple[tuple[str, str], ...], dict[Any, float]] = {}
    for record in records:
        if record.results.finished and record.evaluations:
            bpb = record.evaluations[-1].test_bpb
            assert bpb is not None  # other lines are no evaluations
            ways.setdefault(_way(record), {})[record.options.get("seed")] = bpb
    if len(ways) < 2:
        return []
    everywhere = set.intersection(*(set(way) for way in ways))
    rows = []
    first = next(iter(ways.values()))
    for way, runs in ways.items():
        name = ", ".join(f"{key} {value}" for key, value in way if (key, value) not in everywhere)
        seeds = [seed for seed in first if seed in runs]
        gain = compare([first[seed] for seed in seeds], [runs[seed] for seed in seeds])
        mean = f"{statistics.fmean(runs.values()):.4f}"
        rows.append((name, [str(len(runs)), mean, "" if runs is first else str(gain)]))
    return rows


def _way(record: Record) -> tuple[tuple[str, str], ...]:
    """Returns names and values of what a run's result follows from, but for its seed."""
    found = {name: str(v) for name, v in record.options.items() if name not in _WITHOUT_EFFECT}
    for part, name in (("data", "manifest_sha256"), ("versions", "kiem"), ("hardware", "devices")):
        values = record.metadata.get(part)
        if isinstance(values, dict):
            found[f"{part} {name}"] = str(values.get(name))[:12]
    return tuple(found.items())
