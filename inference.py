"""Let a trained model continue text; `python inference.py --help` lists the options."""

import sys

from kiem.cli import run
from kiem.config import InferenceOptions

if __name__ == "__main__":
    from kiem.inference.write import write

    sys.exit(run(InferenceOptions, "inference.py", write))
