"""Minimal pairs: does the model find a sentence likelier than the same sentence with one mistake?

The files have BLiMP's shape (arXiv:1912.00582), so that the published suites can be used as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from kiem.data.sources import resolve_source
from kiem.errors import ExitCode, UserError
from kiem.evaluation.language_model import LanguageModel, text_nats

BUILT_IN = "minimal-pairs"
# What BLiMP, BLiMP-NL and others call the phenomenon that a pair is about.
_PHENOMENON_KEYS = ("linguistics_term", "linguistic_phenomenon", "phenomenon", "UID")
_Z_95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in one mistake, and the phenomenon that it is about."""

    good: str
    bad: str
    phenomenon: str


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose good sentence is the likelier one, with its 95 % Wilson interval."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    correct: int
    pairs: int


def read_suite(names: tuple[str, ...]) -> list[Pair]:
    """Returns the pairs of a suite.

    Args:
        names: BUILT_IN, or files, folders and globs of .jsonl and .parquet.

    Raises:
        UserError: a file is missing, or a line has no pair; names it.
    """
    if BUILT_IN in names:
        file = Path(str(resources.files("kiem.evaluation") / "suite" / "minimal_pairs.jsonl"))
        others = tuple(name for name in names if name != BUILT_IN)
        return [*_read_file(file), *(read_suite(others) if others else [])]
    paths = resolve_source(names, None, option="--suite").paths
    return [pair for path in paths for pair in _read_file(path)]


def prefers_good(model: LanguageModel, pairs: Sequence[Pair]) -> np.ndarray:
    """Says of each pair whether the model finds the good sentence likelier, bool [pairs].

    Compared are the probabilities of the whole sentences after <bos>; a tie is not a preference.
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
        **vars(accuracy(int(is_correct.sum()), len(pairs))),
        "phenomena": {
            name: vars(accuracy(sum(results), len(results)))
            for name, results in sorted(by_phenomenon.items())
        },
    }


def accuracy(correct: int, pairs: int) -> Accuracy:
    """Returns the share of `correct` in `pairs` with its Wilson score interval (1927)."""
    share, z2 = correct / pairs, _Z_95**2
    center = (share + z2 / (2 * pairs)) / (1 + z2 / pairs)
    spread = share * (1 - share) / pairs + z2 / (4 * pairs**2)
    half = _Z_95 * math.sqrt(spread) / (1 + z2 / pairs)
    return Accuracy(share, max(0.0, center - half), min(1.0, center + half), correct, pairs)


def _read_file(path: Path) -> list[Pair]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise _bad_suite(str(path), "unknown type of file")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    pairs = []
    for number, row in enumerate(rows, start=1):
        texts = [row.get("sentence_good"), row.get("sentence_bad")]
        good, bad = (text.strip() if isinstance(text, str) else "" for text in texts)
        if not good or not bad or good == bad:
            raise _bad_suite(f"{path}:{number}", "no two sentences that differ")
        names = (row[key] for key in _PHENOMENON_KEYS if isinstance(row.get(key), str))
        pairs.append(Pair(good, bad, next(names, path.stem)))
    if not pairs:
        raise _bad_suite(str(path), "the file is empty")
    return pairs


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _bad_suite(f"{path}:{number}", f"not JSON ({error})") from error
            if not isinstance(row, dict):
                raise _bad_suite(f"{path}:{number}", "not a JSON object")
            yield row


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.ParquetFile(path).read().to_pylist())
    except (pa.ArrowException, OSError) as error:
        what = f"damaged Parquet ({str(error).splitlines()[0]})"
        raise _bad_suite(str(path), what) from error


def _bad_suite(where: str, what: str) -> UserError:
    return UserError(
        what,
        where=where,
        fix="Give .jsonl or .parquet with sentence_good and sentence_bad, as BLiMP has them.",
        exit_code=ExitCode.BAD_INPUT,
    )
