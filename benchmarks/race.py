"""A race for quality: what Trainer's usual recipe reaches in ten minutes, and kiem in two and ten.

    python benchmarks/race.py --text FOLDER --heldout FOLDER

The same texts, the same 16 384-entry vocabulary, the same shape (gemma3-nano, 9.9 million
parameters), the same machine and precision. kiem has its defaults. Trainer has AdamW with a cosine
schedule, which follows the clock as kiem's does, at the best of several learning rates: all are
tried with the first seed. What counts is bits per byte on texts that no side trained on, measured
by evaluate.py for both. Time is that of the updates on both sides; what compiling takes is shown.

Each finished run is a line of --runs, and a second start does only those that are missing. A line
does not tell the text or kiem's version: after a change of these take another file.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import TRAINER_REQUIREMENTS, environment, machine, make_chunks, run_peer, run_script
from rich.console import Console
from rich.table import Table

from kiem import cli
from kiem.compute.speed import prefers_bf16
from kiem.evaluation.significance import compare

_VOCABULARY = 16_384
_CHUNK_SIZE = 512
_BATCH_SIZE = 8
_MODEL = "gemma3-nano"


@dataclass(frozen=True)
class Options:
    """Race against transformers' Trainer."""

    text: Path
    """Folder with .jsonl files to train on."""
    heldout: Path
    """Folder with .jsonl files to measure on."""
    runs: Path = Path("race_runs.jsonl")
    """File of finished runs."""
    chunks: Path = Path("processed_data")
    """Folder of the chunk directory, which is made when it is not there."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of runs."""
    minutes: tuple[float, ...] = (2, 10)
    """Times of kiem."""
    trainer_minutes: float = 10
    """Time of Trainer."""
    trainer_learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Learning rates of Trainer, of which the best counts."""


@dataclass(frozen=True)
class Run:
    """One side's training.

    Attributes:
        machine: as machine() says it.
        side: "kiem" or "Trainer".
        minutes: time of the updates.
        learning_rate: the highest; None for kiem's default.
        seed: of first weights and the order of the text.
    """

    machine: str
    side: str
    minutes: float
    learning_rate: float | None
    seed: int


def main(options: Options, console: Console) -> None:
    here = machine()
    console.print(here)
    data = make_chunks(options.text, f"train:{_VOCABULARY}", _CHUNK_SIZE, options.chunks, "race")

    def result(side: str, minutes: float, rate: float | None, seed: int) -> dict[str, Any]:
        return find_or_do(Run(here, side, minutes, rate, seed), options, data, console)

    def trainer(rate: float, seed: int) -> dict[str, Any]:
        return result("Trainer", options.trainer_minutes, rate, seed)

    first = {rate: trainer(rate, options.seeds[0]) for rate in options.trainer_learning_rates}
    best = min(first, key=lambda rate: float(first[rate]["bpb"]))
    name = f"Trainer, {options.trainer_minutes:g} minutes at"
    sides = {f"{name} {best:g}": [trainer(best, seed) for seed in options.seeds]}
    for minutes in options.minutes:
        runs = [result("kiem", minutes, None, seed) for seed in options.seeds]
        sides[f"kiem, {minutes:g} minutes"] = runs
    sides |= {f"{name} {rate:g}": [run] for rate, run in first.items() if rate != best}
    console.print(side_by_side(sides))


def side_by_side(sides: dict[str, list[dict[str, Any]]]) -> Table:
    """Returns the runs of each side, and how they differ from those of the first."""
    names = ("", "seeds", "updates", "whole program", "tokens", "bits per byte", "than the first")
    table = Table(*names, title="means; differences ± standard error")
    first = next(iter(sides.values()))
    for name, runs in sides.items():
        seconds, wall_seconds, tokens, bpb = (
            statistics.fmean(run[key] for run in runs)
            for key in ("seconds", "wall_seconds", "tokens", "bpb")
        )
        pairs = [[run["bpb"] for run in side[: len(runs)]] for side in (first, runs)]
        table.add_row(
            name,
            str(len(runs)),
            f"{seconds:.0f} s",
            f"{wall_seconds:.0f} s",
            f"{tokens:,.0f}",
            f"{bpb:.3f}",
            str(compare(*pairs)) if runs is not first else "",
        )
    return table


def find_or_do(run: Run, options: Options, data: Path, console: Console) -> dict[str, Any]:
    """Returns the result of a run from the file of runs, or trains and adds it."""
    wanted = dataclasses.asdict(run)
    text = options.runs.read_text(encoding="utf-8") if options.runs.exists() else ""
    for line in map(json.loads, text.splitlines()):
        if line.items() >= wanted.items():
            return line
    with tempfile.TemporaryDirectory() as name:
        train = run_kiem if run.side == "kiem" else run_trainer
        started = time.perf_counter()
        figures, model = train(run, data, Path(name), console)
        figures["wall_seconds"] = round(time.perf_counter() - started, 1)
        figures |= measure(model, options.heldout)
    result = {**wanted, **figures}
    with options.runs.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    console.print(result)
    return result


def run_trainer(
    run: Run, data: Path, folder: Path, console: Console
) -> tuple[dict[str, Any], Path]:
    """Trains by Trainer; returns tokens and the seconds of updates, and the model's folder."""
    python = environment("peer-transformers", TRAINER_REQUIREMENTS, console)
    result = run_peer(
        python,
        "trainer_peer.py",
        _MODEL,
        _VOCABULARY,
        data=str(data),
        output=str(folder),
        chunk_size=_CHUNK_SIZE,
        batch_size=_BATCH_SIZE,
        accumulation=1,
        checkpointing=False,
        bf16=prefers_bf16(torch.device("cpu")),
        seconds=run.minutes * 60,
        learning_rate=run.learning_rate,
        seed=run.seed,
        save=True,
    )
    return {"seconds": round(result["seconds"], 1), "tokens": result["tokens"]}, folder


def run_kiem(run: Run, data: Path, folder: Path, _: Console) -> tuple[dict[str, Any], Path]:
    """Trains by training.py; returns tokens and the seconds of updates, and the model's folder."""
    run_script(
        "training.py",
        *("--dataset-path", data, "--output-dir", folder, "--run-name", "run"),
        *("--model", _MODEL, "--max-minutes", str(run.minutes), "--seed", str(run.seed)),
        *("--compile", "always", "--minimal-pairs", "never", "--eval-steps", "0"),
        *("--save-steps", "0"),
    )
    model = folder / "run" / "final_model"
    summary = json.loads((model / "training_summary.json").read_text())
    return {"seconds": round(summary["seconds"], 1), "tokens": summary["tokens"]}, model


def measure(model: Path, heldout: Path) -> dict[str, float]:
    """Returns bits per byte and its interval's ends."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        run_script(
            "evaluate.py",
            *("--model-path", model, "--data", heldout, "--context", str(_CHUNK_SIZE)),
            *("--json", output),
        )
        result = json.loads(output.read_text())
    return {name: round(result[name], 5) for name in ("bpb", "bpb_low", "bpb_high")}


if __name__ == "__main__":
    sys.exit(cli.run(Options, __file__, main))
