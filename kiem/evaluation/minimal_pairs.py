"""Minimal pairs: how often a model prefers a sentence to the same sentence with one mistake.

The files have BLiMP's format (arXiv:1912.00582), so the published suites work too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from rich.console import Console

from kiem.core.errors import bad_input
from kiem.data.read.formats import WITH_COLUMNS
from kiem.data.read.readers import place, read_records
from kiem.data.read.sources import local_source
from kiem.evaluation.language_model import LanguageModel, text_nats

BUILT_IN = "minimal-pairs"
# The names that BLiMP, BLiMP-NL and others have for the phenomenon of a pair.
_PHENOMENON_KEYS = ("linguistics_term", "linguistic_phenomenon", "phenomenon", "UID")
_FIX = f"Give files with sentence_good and sentence_bad, as BLiMP has them ({WITH_COLUMNS})."
_Z_95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in one mistake, and the phenomenon it illustrates."""

    good: str
    bad: str
    phenomenon: str


def read_suite(names: Sequence[str], console: Console | None = None) -> list[Pair]:
    """Returns the pairs of a suite.

    Args:
        names: BUILT_IN, or files, folders and globs of files with columns.
        console: where files that are not read are listed.

    Raises:
        UserError: a file is missing, or a line has no pair; names it.
    """
    built_in = str(resources.files("kiem.evaluation") / "suite" / "minimal_pairs.jsonl")
    files = [built_in if name == BUILT_IN else name for name in names]
    source = local_source(files, "--suite", console)
    pairs = []
    for part, number, row in read_records(source, _FIX):
        texts = [row.get("sentence_good"), row.get("sentence_bad")]
        good, bad = (text.strip() if isinstance(text, str) else "" for text in texts)
        if not good or not bad or good == bad:
            raise bad_input(place(source, part, number), "no two sentences that differ", _FIX)
        phenomena = (row[key] for key in _PHENOMENON_KEYS if isinstance(row.get(key), str))
        pairs.append(Pair(good, bad, next(phenomena, source.files[part.file].label)))
    if not pairs:
        raise bad_input(f"--suite {' '.join(names)}", "there are no pairs", _FIX)
    return pairs


def prefers_good(model: LanguageModel, pairs: Sequence[Pair]) -> np.ndarray:
    """Returns for each pair whether the model finds the good sentence likelier, bool [pairs].

    Compares the probabilities of the whole sentences after <bos>; a tie is not a preference.
    """
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    good, bad = text_nats(model, model.encode(texts)).reshape(-1, 2).T
    return good < bad


def summarize(pairs: Sequence[Pair], is_correct: np.ndarray) -> dict[str, Any]:
    """Returns the accuracy over all pairs, and of every phenomenon under "phenomena"."""
    by_phenomenon: dict[str, list[bool]] = {}
    for pair, correct in zip(pairs, is_correct, strict=True):
        by_phenomenon.setdefault(pair.phenomenon, []).append(bool(correct))
    return {
        **accuracy(int(is_correct.sum()), len(pairs)),
        "phenomena": {
            name: accuracy(sum(results), len(results))
            for name, results in sorted(by_phenomenon.items())
        },
    }


def accuracy(correct: int, pairs: int) -> dict[str, float]:
    """Returns the share of `correct` in `pairs` with its 95 % Wilson score interval (1927)."""
    share, z2 = correct / pairs, _Z_95**2
    center = (share + z2 / (2 * pairs)) / (1 + z2 / pairs)
    spread = share * (1 - share) / pairs + z2 / (4 * pairs**2)
    half = _Z_95 * math.sqrt(spread) / (1 + z2 / pairs)
    return {
        "accuracy": share,
        "accuracy_low": max(0.0, center - half),
        "accuracy_high": min(1.0, center + half),
        "correct": correct,
        "pairs": pairs,
    }
