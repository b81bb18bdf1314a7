"""What report.py does: draw the page of one run or of several."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kiem.config import ReportOptions
from kiem.report.page import REPORT_FILE, write_report


def draw(options: ReportOptions, console: Console) -> None:
    """Runs report.py.

    Args:
        options: all options of report.py.
        console: where the page's name goes.

    Raises:
        UserError: a folder is no run directory, or the page cannot be written.
    """
    output = options.output
    if output is None:
        is_one = len(options.runs) == 1
        output = options.runs[0] / REPORT_FILE if is_one else Path("comparison.html")
    write_report(options.runs, output, options.price)
    console.print(str(output))
