"""What a run writes down about itself: metrics.jsonl always, trackers when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kiem.files import append_json_line, write_text
from kiem.report.record import METRICS_FILE, read_metrics
from kiem.training.trackers import Tracker


class Metrics:
    """Writes one line of figures at a time.

    Args:
        run_directory: where metrics.jsonl is.
        trackers: where the figures go as well.
    """

    def __init__(self, run_directory: Path, trackers: Sequence[Tracker]):
        self._path = run_directory / METRICS_FILE
        self._trackers = trackers
        self._samples: list[tuple[int, str, str]] = []
        if trackers and self._path.exists():
            for line in read_metrics(self._path)[0]:
                self._remember_samples(line["step"], line)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes figures of an update, counted from 1."""
        append_json_line(self._path, {"step": step, **figures})
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        self._remember_samples(step, figures)
        for tracker in self._trackers:
            if numbers:
                tracker.log(step, numbers)
            if "samples" in figures:
                tracker.log_samples(step, self._samples)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Gives the trackers the run's results and ends them."""
        for tracker in self._trackers:
            tracker.finish(summary)

    def _remember_samples(self, step: int, figures: Mapping[str, Any]) -> None:
        if self._trackers:
            for sample in figures.get("samples", ()):
                self._samples.append((step, sample["prompt"], sample["text"]))


def keep_metrics_until(run_directory: Path, step: int) -> None:
    """Drops the lines of a resumed run that come after its checkpoint: they will come again."""
    path = run_directory / METRICS_FILE
    if path.exists():
        lines, _ = read_metrics(path)
        kept = [line for line in lines if line["step"] <= step and step > 0]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
