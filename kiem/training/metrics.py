"""What a run writes down about itself: metrics.jsonl always, trackers when asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kiem.cli import warn
from kiem.errors import UserError
from kiem.files import append_json_lines, fsync_file, write_text
from kiem.report.record import METRICS_FILE, read_metrics
from kiem.training.trackers import Tracker


class Metrics:
    """Writes one line of figures at a time.

    Args:
        run_directory: where metrics.jsonl is.
        trackers: where the figures go as well.
        console: where a warning goes when the disk refuses a line, which is then written with the
            next one; None: that is an error.
    """

    def __init__(
        self, run_directory: Path, trackers: Sequence[Tracker], console: Console | None = None
    ):
        self._directory = run_directory
        self._path = run_directory / METRICS_FILE
        self._console = console
        self._waiting: list[dict[str, Any]] = []
        self._trackers = trackers
        self._samples: list[tuple[int, str, str]] = []
        if trackers and self._path.exists():
            for line in read_metrics(self._path)[0]:
                self._remember_samples(line["step"], line)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes figures of an update, counted from 1; JSON has no number for infinity or NaN."""
        figures = {
            name: value
            for name, value in figures.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        self._waiting.append({"step": step, **figures})
        try:
            append_json_lines(self._path, self._waiting)
            self._waiting = []
        except UserError as error:
            if self._console is None:
                raise
            if len(self._waiting) == 1:
                warn(self._console, f"{error.where}: {error.what}; its lines wait in memory")
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for name, entry in figures.get("per_source", {}).items():
            numbers[f"test_bpb/{name}"] = entry["bpb"]
        self._remember_samples(step, figures)
        for tracker in self._trackers:
            if numbers:
                tracker.log(step, numbers)
            if "samples" in figures:
                tracker.log_samples(step, self._samples)

    def rewind(self, step: int) -> None:
        """Drops all figures after an update, which will come again."""
        self._waiting = [line for line in self._waiting if line["step"] <= step]
        keep_metrics_until(self._directory, step)

    def sync(self) -> None:
        """Returns when the log has reached the disk."""
        if self._path.exists():
            fsync_file(self._path)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Gives the trackers the run's results and ends them."""
        for tracker in self._trackers:
            tracker.finish(summary)

    def _remember_samples(self, step: int, figures: Mapping[str, Any]) -> None:
        if self._trackers:
            for sample in figures.get("samples", ()):
                self._samples.append((step, sample["prompt"], sample["text"]))


def keep_metrics_until(run_directory: Path, step: int, is_last: bool = False) -> None:
    """Drops the lines of a resumed run that come after its checkpoint: they will come again.

    Args:
        run_directory: the run directory.
        step: the checkpoint's.
        is_last: whether the updates are all done, so that only the last evaluation comes again.
    """
    path = run_directory / METRICS_FILE
    if path.exists():
        lines, _ = read_metrics(path)
        kept = [
            line
            for line in lines
            if step > 0
            and line["step"] <= step
            and not (is_last and line["step"] == step and "test_loss" in line)
        ]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
