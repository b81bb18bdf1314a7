"""Draws the report beside the training, for little of its time."""

from __future__ import annotations

import time
from pathlib import Path

from kiem.report.page import REPORT_FILE, write_report

# A report may take this share of the time, so that a long log and frequent evaluations cost little.
_SHARE_OF_TIME = 0.02


class Reporter:
    """Writes report.html of a run.

    Args:
        directory: the run directory.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._next = time.monotonic()

    def write_if_cheap(self) -> None:
        """Writes the report, unless that would take more than a fiftieth of the time."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Writes the report."""
        started = time.monotonic()
        write_report([self._directory], self._directory / REPORT_FILE)
        now = time.monotonic()
        self._next = now + (now - started) / _SHARE_OF_TIME
