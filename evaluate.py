"""Measure how good a language model is; `python evaluate.py --help` lists the options."""

import sys

from rich.console import Console

from kiem.cli import run
from kiem.config import EvaluationOptions


def main(options: EvaluationOptions, console: Console) -> None:
    from kiem.evaluation.command import evaluate  # slow to import: not before the options

    evaluate(options, console)


if __name__ == "__main__":
    sys.exit(run(EvaluationOptions, "evaluate.py", main))
