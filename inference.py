"""Let a trained model continue text; `python inference.py --help` lists the options."""

import sys

from rich.console import Console

from kiem.cli import run
from kiem.config import InferenceOptions


def main(options: InferenceOptions, console: Console) -> None:
    from kiem.inference.generate import generate  # not before the options are right

    generate(options, console)


if __name__ == "__main__":
    sys.exit(run(InferenceOptions, "inference.py", main))
