"""Train a Gemma 3 model on a chunk directory; `python training.py --help` lists the options."""

from rich.console import Console

from kiem.cli import run
from kiem.config import TrainingOptions
from kiem.parallel.launch import leave


def main(options: TrainingOptions, console: Console) -> None:
    from kiem.training.loop import train  # slow to import: not before the options are right

    train(options, console)


if __name__ == "__main__":
    leave(run(TrainingOptions, "training.py", main))
