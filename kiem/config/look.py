"""Options of kiem look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from kiem.config.limits import Seed


@dataclass(frozen=True)
class LookOptions:
    """Show what is in a chunk directory, in the terminal and on a page: sources, lengths,
    languages, frequent tokens, rejected and random documents."""

    directory: Path
    """Chunk directory that preprocess.py made; `kiem look DIR` is short for it."""
    output: Path | None = None
    """The page. Default: beside the chunk directory, with its name and .html."""
    samples: Annotated[int, Meta(ge=0, le=1000)] = 5
    """Documents to show at random, and rejected ones for each reason."""
    seed: Seed = 42
    """Seed of what is chosen at random, for counting and for showing."""
