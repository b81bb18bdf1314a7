"""The log of a run: metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kiem.core.console import warn
from kiem.core.errors import UserError
from kiem.core.files import append_json_lines, fsync_file, write_bytes
from kiem.report.record import METRICS_FILE, read_metrics


class Metrics:
    """Writes one line of figures at a time.

    A line that the disk refuses is written with the next one.

    Args:
        run_directory: where metrics.jsonl is.
        console: where a warning goes when lines have to wait.
        stops_run: whether a refusal is to end the run: `check` then says so.
    """

    def __init__(self, run_directory: Path, console: Console, *, stops_run: bool):
        self._directory = run_directory
        self._path = run_directory / METRICS_FILE
        self._console = console
        self._stops_run = stops_run
        self._waiting: list[dict[str, Any]] = []
        self._failure: UserError | None = None

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes figures of an update, counted from 1; JSON has no number for infinity or NaN."""
        self._waiting.append({"step": step, **finite(figures)})
        try:
            append_json_lines(self._path, self._waiting)
            self._waiting, self._failure = [], None
        except UserError as error:
            if self._failure is None and not self._stops_run:
                warn(self._console, f"{error.where}: {error.what}; its lines wait in memory")
            self._failure = error

    def check(self) -> None:
        """Raises the disk's refusal of a line if that is to end the run."""
        if self._failure is not None and self._stops_run:
            raise self._failure

    def rewind(self, step: int) -> None:
        """Drops all figures after an update, which will come again."""
        self._waiting = [line for line in self._waiting if line["step"] <= step]
        keep_metrics_until(self._directory, step)

    def sync(self) -> None:
        """Returns when the log has reached the disk."""
        if self._path.exists():
            fsync_file(self._path)


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns figures without those that are infinite or no number."""
    return {
        name: value
        for name, value in figures.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


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
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        write_bytes(path, text.encode(errors="replace"))
