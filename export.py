"""Write a trained model for other programs; `python export.py --help` lists the options."""

import sys

from rich.console import Console

from kiem.cli import run
from kiem.config import ExportOptions


def main(options: ExportOptions, console: Console) -> None:
    from kiem.export.export import export  # slow to import: not before the options are right

    export(options, console)


if __name__ == "__main__":
    sys.exit(run(ExportOptions, "export.py", main))
