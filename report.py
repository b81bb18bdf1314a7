"""Draw the report of training runs; `python report.py --help` lists the options."""

import sys

from rich.console import Console

from kiem.cli import run
from kiem.config import ReportOptions


def main(options: ReportOptions, console: Console) -> None:
    from kiem.report.page import report  # slow to import: not before the options are right

    report(options, console)


if __name__ == "__main__":
    sys.exit(run(ReportOptions, "report.py", main))
