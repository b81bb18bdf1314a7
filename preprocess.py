"""Turn Dutch text into a chunk directory; `python preprocess.py --help` lists the options."""

import sys

from rich.console import Console

from kiem.cli import run
from kiem.config import PreprocessOptions


def main(options: PreprocessOptions, console: Console) -> None:
    from kiem.data.prepare.preprocess import (
        preprocess,  # slow to import: not before the options are right
    )

    preprocess(options, console)


if __name__ == "__main__":
    sys.exit(run(PreprocessOptions, "preprocess.py", main))
