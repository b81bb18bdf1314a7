"""A race for quality: what Trainer's usual recipe reaches in ten minutes, and kiem in two and ten.

    python benchmarks/race.py --text FOLDER --heldout FOLDER

The same texts, the same 16 384-entry vocabulary, the same shape (gemma3-nano, 9.9 million
parameters), the same machine. Trainer has AdamW at 1e-3 with a cosine schedule over as many updates
as fit the time. What counts is bits per byte on texts that no side trained on, measured by
evaluate.py for both. Time is that of the updates on both sides; what compiling takes is shown.

Free class: kiem with another vocabulary and recipe, of the same texts; only time, machine and what
counts are the same. Settings were found on a split of the training texts (docs/recipe.md).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import TRAINER_REQUIREMENTS, environment, machine, make_chunks, run_peer, run_script
from rich.console import Console
from rich.table import Table

from kiem import cli

_VOCABULARY = 16_384
_CHUNK_SIZE = 512
_BATCH_SIZE = 8
_MODEL = "gemma3-nano"
_FREE_VOCABULARY = 32_768
_FREE_OPTIONS = ("--schedule", "wsd")


@dataclass(frozen=True)
class Options:
    """Race against transformers' Trainer."""

    text: Path
    """Folder with .jsonl files to train on."""
    heldout: Path
    """Folder with .jsonl files to measure on."""
    trainer_minutes: float = 10
    """Time of Trainer; 0 leaves it out."""
    minutes: tuple[float, ...] = (2, 10)
    """Times of kiem."""
    free_minutes: tuple[float, ...] = (10,)
    """Times of kiem in the free class."""
    output: Path | None = None
    """Keep models here. Default: nowhere."""


@dataclass(frozen=True)
class Result:
    """Where a side ended.

    Attributes:
        seconds: of updates.
        wall_seconds: of the program, its start, compiling and evaluation included.
        tokens: trained on.
        bpb, low, high: bits per byte on the held-out texts, with the ends of its interval.
    """

    seconds: float
    wall_seconds: float
    tokens: int
    bpb: float
    low: float
    high: float


def main(options: Options, console: Console) -> None:
    console.print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = options.output or Path(name)
        data = make_chunks(options.text, f"train:{_VOCABULARY}", _CHUNK_SIZE, folder, "data")
        results = {}
        if options.trainer_minutes:
            name = f"Trainer, {options.trainer_minutes:g} minutes"
            results[name] = run_trainer(options, data, folder / "trainer", console)
            console.print(name, results[name])
        for minutes in options.minutes:
            name = f"kiem, {minutes:g} minutes"
            results[name] = run_kiem(options, data, folder / "kiem", minutes)
            console.print(name, results[name])
        for minutes in options.free_minutes:
            name = f"kiem, free class, {minutes:g} minutes"
            tokenizer = f"train:{_FREE_VOCABULARY}"
            free_data = make_chunks(options.text, tokenizer, _CHUNK_SIZE, folder, "free-data")
            results[name] = run_kiem(options, free_data, folder / "free", minutes, *_FREE_OPTIONS)
            console.print(name, results[name])
    first = next(iter(results.values()))
    table = Table("", "updates", "whole program", "tokens", "bits per byte", "better by")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.seconds:.0f} s",
            f"{result.wall_seconds:.0f} s",
            f"{result.tokens:,}",
            f"{result.bpb:.3f} ({result.low:.3f} to {result.high:.3f})",
            f"{first.bpb - result.bpb:+.3f}",
        )
    console.print(table)


def run_trainer(options: Options, data: Path, output: Path, console: Console) -> Result:
    python = environment("peer-transformers", TRAINER_REQUIREMENTS, console)
    started = time.perf_counter()
    result = run_peer(
        python,
        "trainer_peer.py",
        _MODEL,
        _VOCABULARY,
        data=str(data),
        output=str(output),
        chunk_size=_CHUNK_SIZE,
        batch_size=_BATCH_SIZE,
        accumulation=1,
        checkpointing=False,
        bf16=False,
        seconds=options.trainer_minutes * 60,
        save=True,
    )
    wall_seconds = time.perf_counter() - started
    return Result(
        result["seconds"], wall_seconds, result["tokens"], *measure(output, options.heldout)
    )


def run_kiem(options: Options, data: Path, output: Path, minutes: float, *words: str) -> Result:
    run = output / f"{minutes:g}-minutes"
    started = time.perf_counter()
    run_script(
        "training.py",
        *("--dataset-path", data, "--output-dir", output, "--run-name", run.name),
        *("--model", _MODEL, "--max-minutes", str(minutes), "--compile", "always"),
        *("--minimal-pairs", "never", "--eval-steps", "0", "--save-steps", "0", *words),
    )
    wall_seconds = time.perf_counter() - started
    model = run / "final_model"
    summary: dict[str, Any] = json.loads((model / "training_summary.json").read_text())
    return Result(
        summary["seconds"], wall_seconds, summary["tokens"], *measure(model, options.heldout)
    )


def measure(model: Path, heldout: Path) -> tuple[float, float, float]:
    """Returns bits per byte and its interval's ends."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        run_script(
            "evaluate.py",
            *("--model-path", model, "--data", heldout, "--context", str(_CHUNK_SIZE)),
            *("--json", output),
        )
        result = json.loads(output.read_text())
    return result["bpb"], result["bpb_low"], result["bpb_high"]


if __name__ == "__main__":
    sys.exit(cli.run(Options, __file__, main))
