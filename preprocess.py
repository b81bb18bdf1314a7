"""Turn Dutch text into a chunk directory; `python preprocess.py --help` lists the options."""

import sys

from rich.console import Console

from kiem.cli import run
from kiem.config import PreprocessOptions


def main(options: PreprocessOptions, console: Console) -> None:
    # Slow to import: not before the options are right.
    from kiem.data.prepare.preprocess import preprocess

    preprocess(options, console)


if __name__ == "__main__":
    sys.exit(run(PreprocessOptions, "preprocess.py", main))
