"""Options of kiem ladder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from kiem.config.limits import Name, Seed


@dataclass(frozen=True)
class LadderOptions:
    """Train a ladder of small models on a chunk directory, and fit how bits per byte and the best
    learning rate depend on parameters and tokens."""

    dataset_path: Path
    """Chunk directory that preprocess.py made."""
    minutes: Annotated[float, Meta(ge=0, le=10**7)] = 120
    """Start no training that would end later than this many minutes from now. The same command
    continues a ladder; 0 only fits and draws it again."""
    output_dir: Path | None = None
    """Folder of the ladder: runs.jsonl with a line for each finished training, and report.html.
    Default: the chunk directory's name with .ladder at its end."""
    models: tuple[Name, ...] = ()
    """Sizes, as of training.py --model. Default: gemma3-0.36m to gemma3-89m, each two to three
    times as large as the one before, as far as the minutes go."""
    tokens: tuple[Annotated[int, Meta(ge=1, le=2**50)], ...] = ()
    """Lengths in tokens. Default: 262144 and its doubles, up to the tokens of the text."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products, as of training.py."""
    seed: Seed = 42
    """Seed of weights and order, the same for all trainings."""
