"""Options of report.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from kiem.config.limits import Price


@dataclass(frozen=True)
class ReportOptions:
    """Write the report of a run again, or one page that compares several runs."""

    runs: Annotated[tuple[Path, ...], Meta(min_length=1)]
    """Run directories, such as trained_models/gemma3-1b-dutch-latest."""
    output: Path | None = None
    """The page. Default: report.html in the run directory, or comparison.html for several runs."""
    price: Price | None = None
    """Cost of the hardware per hour. Default: that of the run."""
