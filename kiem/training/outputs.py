"""Outputs of a run: progress and results on the screen, the report, the final model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from kiem.core.files import format_bytes, new_folder, point_link, write_json, write_text
from kiem.core.manifest import write_manifest
from kiem.data.mixture import describe_reads
from kiem.data.texts import list_texts
from kiem.model.gemma3 import Gemma3
from kiem.model.io import write_model
from kiem.report.card import model_card
from kiem.report.page import REPORT_FILE, write_report
from kiem.report.record import SUMMARY_FILE
from kiem.tokenizer.tokenizer import write_tokenizer
from kiem.training.run import Run, RunSpec, TrainState

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """A run's progress: a live line in a terminal, plain lines elsewhere."""

    def __init__(self, run: Run):
        self._recipe = run.spec.recipe
        self._console = console = run.log.console
        self._last_line = 0.0
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("", total=1.0)

    def start(self) -> None:
        """Shows the live line, if this is a terminal."""
        self._progress.start()

    def stop(self) -> None:
        """Removes the live line."""
        self._progress.stop()

    def show_step(self, state: TrainState, figures: Mapping[str, Any]) -> None:
        """Shows the figures of an update."""
        line = (
            f"step {state.step:,}  loss {figures['loss']:.3f}  "
            f"lr {figures['learning_rate']:.1e}  norm {figures['grad_norm']:.2f}  "
            f"{figures['tokens_per_second']:,.0f} tokens/s  MFU {figures['mfu']:.0%}  "
            f"{format_bytes(figures['memory_bytes'])}"
        )
        progress = state.progress(self._recipe)
        self._progress.update(self._task, description=line, completed=min(progress, 1.0))
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"{progress:4.0%}  {line}")

    def show_evaluation(self, state: TrainState, figures: Mapping[str, Any]) -> None:
        """Shows an evaluation and its first sample of text, if they succeeded."""
        if "test_loss" in figures:
            self._console.print(
                f"step {state.step:,}: test loss {figures['test_loss']:.3f}, perplexity "
                f"{figures['test_perplexity']:.1f}, {figures['test_bpb']:.3f} bits per byte"
            )
        _show_first_sample(figures, self._console)


def show_start(run: Run, state: TrainState) -> None:
    """Prints what is trained on what, and for how long."""
    spec, recipe, console = run.spec, run.spec.recipe, run.log.console
    data, distributed, chunk_size = spec.data, spec.distributed, spec.data.train.chunk_size
    console.print(
        f"{spec.model_name}: {spec.config.num_parameters():,} parameters, vocabulary of "
        f"{spec.config.vocab_size:,}; {distributed.world_size} x {distributed.name} in "
        f"{distributed.precision}, matrix products at {distributed.matrix_flops / 1e12:.2f} TFLOP/s"
    )
    for directory in (*data.mixture.directories, *data.mixture.anneal):
        test = directory.manifest["splits"]["test"]["chunks"]
        console.print(
            f"{directory.path}: {directory.num_chunks:,} chunks of {chunk_size:,} tokens for "
            f"training, {test:,} for testing"
        )
    console.print(f"the training reads {describe_reads(spec.order, recipe.max_steps)}")
    budget = f"{recipe.max_steps:,} updates" if recipe.max_steps is not None else "updates"
    if recipe.max_seconds is not None:
        budget = f"{recipe.max_seconds / 60:g} minutes of {budget}"
    console.print(
        f"{budget} of {recipe.chunks_per_step * chunk_size:,} tokens "
        f"({recipe.batch_size} chunks x {recipe.accumulation} passes x {distributed.world_size} "
        f"devices), learning rate {recipe.learning_rate:g}"
    )
    if recipe.batch_warmup_steps:
        quarter = recipe.batch_warmup_steps // 2
        console.print(
            f"the first {quarter:,} updates are a quarter as large, the next "
            f"{recipe.batch_warmup_steps - quarter:,} half as large (--batch-warmup-steps)"
        )
    if (branch := spec.branched_from) is not None:
        different = "; ".join(branch["differences"]) or "without a difference"
        console.print(f"branch of {branch['run']} after step {branch['step']:,}: {different}")
    if run.resumed_from is not None:
        console.print(f"resuming from {run.resumed_from}, after step {state.step:,}")


def show_results(run: Run, state: TrainState, figures: Mapping[str, Any]) -> None:
    """Prints the closing table and what to try next."""
    console = run.log.console
    rows = {
        "steps": f"{state.step:,}",
        "tokens": f"{state.tokens:,}",
        "time": f"{state.seconds / 60:.1f} minutes",
        "tokens per second": f"{state.tokens / max(state.seconds, 1e-9):,.0f}",
        "peak memory": format_bytes(figures["memory_bytes"]),
    }
    if "test_loss" in figures:
        rows["test loss"] = f"{figures['test_loss']:.4f}"
        rows["test perplexity"] = f"{figures['test_perplexity']:.2f}"
        rows["test bits per byte"] = f"{figures['test_bpb']:.4f}"
    if "minimal_pairs" in figures:
        pairs = figures["minimal_pairs"]
        rows["minimal pairs"] = f"{pairs['correct']} of {pairs['pairs']} correct"
    _print_table(rows, str(run.spec.directory), console)
    _show_first_sample(figures, console)
    console.print(f"\nThe run on one page: {run.spec.directory / REPORT_FILE}")
    console.print(f"Try it: python inference.py --model-path {run.spec.final_model} --interactive")


def _print_table(rows: Mapping[str, str], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _show_first_sample(figures: Mapping[str, Any], console: Console) -> None:
    for sample in figures["samples"][:1]:
        console.print(f"  {sample['prompt']}{sample['text']}", style="dim")


def write_run_report(spec: RunSpec) -> None:
    """Writes the report.html of the run directory."""
    write_report([spec.directory], spec.directory / REPORT_FILE)


def write_final_model(
    run: Run, state: TrainState, model: Gemma3, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes final_model/ and returns the run's summary, which is in it.

    Args:
        run, state, model: of the finished training.
        figures: the last evaluation, as far as it succeeded.

    Raises:
        UserError: the disk refuses.
    """
    spec = run.spec
    summary = {
        **spec.metadata(),
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "texts": list_texts(spec.data.mixture, spec.order, state.step),
        **figures,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    make_card = partial(model_card, summary, spec.directory.name, spec.options.language)
    card = run.log.attempt("the model card", make_card)
    folder = spec.final_model
    with new_folder(folder, overwrite=folder.exists()) as unfinished:
        known = write_model(model, unfinished, run.spec.data.tokenizer.special_ids)
        write_tokenizer(run.spec.data.tokenizer, unfinished)
        write_json(unfinished / SUMMARY_FILE, summary)
        if card is not None:
            write_text(unfinished / "README.md", card)
        write_manifest(unfinished, known, without=("README.md",))
    return summary


def point_latest_link(spec: RunSpec) -> None:
    """Points the link of the newest run of this model to this one."""
    link = spec.directory.parent / f"{spec.model_name}-dutch-latest"
    point_link(link, spec.directory.name)
