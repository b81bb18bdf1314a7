"""Train a Gemma 3 model on a chunk directory; `python training.py --help` lists the options."""

import sys

from kiem.cli import run
from kiem.config import TrainingOptions

if __name__ == "__main__":
    from kiem.training.loop import train

    sys.exit(run(TrainingOptions, "training.py", train))
