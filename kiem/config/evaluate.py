"""Options of evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from kiem.config.limits import MOST_TOKENS, Count, Name, Seed


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluate a language model: bits per byte of text, and minimal pairs; without --data and
    --suite, the built-in minimal pairs."""

    model_path: Name
    """Model directory (final_model/ of a run), or a Hub id; with transformers installed, any causal
    language model."""
    data: tuple[Name, ...] = ()
    """Text for bits per byte: files, folders and globs as for preprocess.py, sample (the built-in
    text), or a chunk directory (its test split)."""
    suite: tuple[Name, ...] = ()
    """minimal-pairs (the built-in Dutch ones), or files in BLiMP's shape, see docs/formats.md."""
    context: Annotated[int, Meta(ge=8, le=MOST_TOKENS)] | None = None
    """Most tokens of context; longer documents are read in overlapping windows. Default: the chunk
    size of the training for kiem's models, the longest context of others."""
    text_column: Name = "text"
    """Column or key of --data that holds a document's text."""
    document_separator: str | None = None
    """Split text files of --data into documents, as in preprocess.py."""
    max_documents: Count | None = None
    """Use only the first documents of --data."""
    json: Path | None = None
    """Write the results to this file."""
    seed: Seed = 42
    """Seed of the bootstrap intervals."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the weights. auto: bf16 on GPUs that support it; on CPUs as stored, or fp32
    without AVX512_BF16."""
