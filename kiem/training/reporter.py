"""Draws the report beside the training, and never at its expense."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from kiem.cli import warn
from kiem.report.page import REPORT_FILE, write_report

# A report may take this share of the time, so that a long log and frequent evaluations cost little.
_SHARE_OF_TIME = 0.02


class Reporter:
    """Writes report.html of a run.

    Args:
        directory: the run directory.
        console: where a warning goes if the report cannot be written.
    """

    def __init__(self, directory: Path, console: Console):
        self._directory = directory
        self._console = console
        self._next = time.monotonic()

    def write_if_cheap(self) -> None:
        """Writes the report, unless that would take more than a fiftieth of the time."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Writes the report; a failure is a warning."""
        started = time.monotonic()
        try:
            write_report([self._directory], self._directory / REPORT_FILE)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run is worth more
            warn(self._console, f"no report was written: {error}")
        now = time.monotonic()
        self._next = now + (now - started) / _SHARE_OF_TIME
