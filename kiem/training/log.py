"""Where the figures of a run go: opened before its first update."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from kiem.core.files import write_json, write_text
from kiem.core.yaml_options import to_dict, to_yaml
from kiem.report.record import CONFIG_FILE, METADATA_FILE, METRICS_FILE, read_metrics
from kiem.training.accessories import attempt, try_before
from kiem.training.background import BackgroundTracker
from kiem.training.metrics import Metrics, keep_metrics_until
from kiem.training.trackers import Tracker, open_tracker, tracker_names

if TYPE_CHECKING:
    from kiem.training.run import Run


def open_log(run: Run, console: Console) -> None:
    """Opens the run's trackers and its log, and writes down what it is made of.

    A tracker that does not start is an error, since a person is there to mend it; not when a
    launcher starts the run again, in the middle of the night.

    Raises:
        UserError: a tracker does not start, or the disk refuses.
    """
    options, directory = run.options, run.directory
    config = {**to_dict(options), **run.facts}
    opening = {
        name: partial(open_tracker, name, options, directory, config, run.step)
        for name in tracker_names(options)
    }
    is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    trackers: dict[str, Tracker | None] = {}
    if is_first_start:
        trackers = {name: try_before(f"--trackers {name}", opening[name]) for name in opening}
    write_text(directory / CONFIG_FILE, to_yaml(options))
    write_json(directory / METADATA_FILE, run.facts)
    keep_metrics_until(directory, run.step, is_last=run.progress >= 1)
    log = directory / METRICS_FILE
    lines = read_metrics(log)[0] if log.exists() else []
    run.metrics = Metrics(directory, console, stops_run=options.on_save_failure == "stop")
    if not is_first_start:
        trackers = {name: attempt(run, console, name, opening[name]) for name in opening}
    run.trackers = {
        name: BackgroundTracker(tracker, lines) for name, tracker in trackers.items() if tracker
    }
