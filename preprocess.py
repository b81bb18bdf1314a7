"""Turn Dutch text into a chunk directory; `python preprocess.py --help` lists the options."""

import sys

from kiem.cli import run
from kiem.config import PreprocessOptions

if __name__ == "__main__":
    from kiem.data.preprocess import preprocess

    sys.exit(run(PreprocessOptions, "preprocess.py", preprocess))
