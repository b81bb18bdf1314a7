"""What training shows on the screen: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kiem.core.files import format_bytes
from kiem.parallel.distributed import Distributed
from kiem.report.page import REPORT_FILE
from kiem.training.run import Run

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows a run's progress, from `start` to `stop`."""

    def __init__(self, run: Run, console: Console):
        self._run = run
        self._console = console
        self._last_line = 0.0
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("", total=1.0)

    def start(self) -> None:
        """Shows the live line, if this is a terminal."""
        self._progress.start()

    def stop(self) -> None:
        """Takes the live line away."""
        self._progress.stop()

    def show_step(self, figures: dict[str, Any]) -> None:
        """Shows the figures of an update."""
        line = (
            f"step {self._run.step:,}  loss {figures['loss']:.3f}  "
            f"lr {figures['learning_rate']:.1e}  norm {figures['grad_norm']:.2f}  "
            f"{figures['tokens_per_second']:,.0f} tokens/s  MFU {figures['mfu']:.0%}  "
            f"{format_bytes(figures['memory_bytes'])}"
        )
        self._progress.update(self._task, description=line, completed=min(self._run.progress, 1.0))
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"{self._run.progress:4.0%}  {line}")

    def show_evaluation(self, figures: dict[str, Any]) -> None:
        """Shows an evaluation and its sample of text, as far as there are any."""
        if "test_loss" in figures:
            self._console.print(
                f"step {self._run.step:,}: test loss {figures['test_loss']:.3f}, perplexity "
                f"{figures['test_perplexity']:.1f}, {figures['test_bpb']:.3f} bits per byte"
            )
        _show_first_sample(figures, self._console)


def show_plan(run: Run, distributed: Distributed, console: Console) -> None:
    """Prints what is about to be trained, on what, with what."""
    recipe, chunk_size = run.recipe, run.train.chunk_size
    budget = []
    if recipe.max_steps is not None:
        budget.append(f"{recipe.max_steps:,} steps")
    if recipe.max_seconds is not None:
        budget.append(f"{recipe.max_seconds / 60:g} minutes")
    console.print(
        f"{run.model_name}: {run.model.config.num_parameters():,} parameters, vocabulary of "
        f"{run.model.config.vocab_size:,}; {distributed.world_size} x {distributed.device.type} in "
        f"{distributed.precision}, matrix products at {distributed.matrix_flops / 1e12:.2f} TFLOP/s"
    )
    console.print(
        f"{run.options.dataset_path}: {run.train.num_chunks:,} chunks of {chunk_size:,} tokens for "
        f"training, {run.test.num_chunks:,} for testing"
    )
    console.print(
        f"{' or '.join(budget)} of {recipe.chunks_per_step * chunk_size:,} tokens "
        f"({recipe.batch_size} chunks x {recipe.accumulation} passes x {distributed.world_size} "
        f"devices), learning rate {recipe.learning_rate:g}"
    )
    if run.resumed_from is not None:
        console.print(f"going on from {run.resumed_from}, after step {run.step:,}")


def show_results(run: Run, figures: dict[str, Any], final_model: Path, console: Console) -> None:
    """Prints the closing table and what to try next."""
    table = Table(title=str(run.directory), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("steps", f"{run.step:,}")
    table.add_row("tokens", f"{run.tokens:,}")
    table.add_row("time", f"{run.seconds / 60:.1f} minutes")
    table.add_row("tokens per second", f"{run.tokens / max(run.seconds, 1e-9):,.0f}")
    table.add_row("peak memory", format_bytes(figures["memory_bytes"]))
    if "test_loss" in figures:
        table.add_row("test loss", f"{figures['test_loss']:.4f}")
        table.add_row("test perplexity", f"{figures['test_perplexity']:.2f}")
        table.add_row("test bits per byte", f"{figures['test_bpb']:.4f}")
    if "minimal_pairs" in figures:
        pairs = figures["minimal_pairs"]
        table.add_row("minimal pairs", f"{pairs['correct']} of {pairs['pairs']} correct")
    console.print(table)
    _show_first_sample(figures, console)
    console.print(f"\nThe run on one page: {run.directory / REPORT_FILE}")
    console.print(f"Try it: python inference.py --model-path {final_model} --interactive")


def _show_first_sample(figures: dict[str, Any], console: Console) -> None:
    for sample in figures["samples"][:1]:
        console.print(f"  {sample['prompt']}{sample['text']}", style="dim")
