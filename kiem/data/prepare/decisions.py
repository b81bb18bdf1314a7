"""The decision about every document: for training, for testing, rejected or beyond the word limit.

It is made in one process and in the order of the plan, so it is the same for any workers. Every
planned unit must be there, up to the one in which the word limit is reached: text is left out
because it was counted, never because its file is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kiem.data.clean.near_duplicates import band_names
from kiem.data.clean.ngrams import duplicated
from kiem.data.prepare.split import CUT, TEST, TRAIN, Split, decide_split
from kiem.data.prepare.units import Unit, UnitJob, open_unit, read_column, read_unit

# Further decisions. REJECTED and what is above it are the reasons by number.
BEYOND, REJECTED = 3, 4
_DUPLICATE, _NEAR_DUPLICATE = REJECTED, REJECTED + 1


class DocumentDecisions(NamedTuple):
    """The decisions about the rows of the units up to the one in which the word limit is reached.

    Attributes:
        units: those units.
        per_unit: int16 [rows] for each of them: TRAIN, TEST, CUT (the end for testing, the
            rest for training), BEYOND the word limit, or REJECTED plus the number of the reason.
        reasons: why rows are rejected.
        split: where the test split ends.
        num_cut: documents that are cut.
        counts: the manifest's entries about all rows that were read.
    """

    units: Sequence[Unit]
    per_unit: list[np.ndarray]
    reasons: list[str]
    split: Split
    num_cut: int
    counts: dict[str, Any]


def decide(
    units: Sequence[Unit], job: UnitJob, test_share: float, chunk_size: int, word_limit: int | None
) -> DocumentDecisions:
    """Decides about every row of finished units.

    Documents are taken as long as they have no more words together than `word_limit`. Raises a
    UserError if a unit file is missing, damaged or of other work.
    """
    rows = _read_rows(units, job, word_limit)
    code, units = rows.code, units[: len(rows.per_unit)]
    # Reject what came before. Equal texts have equal positions; that two different ones have, too,
    # is to be expected once in some 6 billion documents, since positions are hashes of 64 bits.
    if job.cleaning.filters != "none":
        _reject_repeated(code, rows.position, _DUPLICATE)
    if job.cleaning.near_duplicates:
        for name in band_names():
            bands = [read_column(read_unit(job.path(unit))[0], name) for unit in units]
            _reject_repeated(code, np.concatenate(bands), _NEAR_DUPLICATE)
    # Split what is kept.
    is_kept = code == TRAIN
    split = decide_split(rows.position[is_kept], rows.num_bytes[is_kept], test_share, chunk_size)
    limit = np.uint64(split.limit)
    code[is_kept & (rows.position < limit)] = TEST
    if split.cut_bytes is not None:
        code[is_kept & (rows.position == limit)] = CUT
    # Count, per reason and per file.
    names = [file.name for file in job.source.files]
    last = max(part.file for unit in units for part in unit.parts)
    is_beyond = code == BEYOND
    reached: dict[str, Any] = {}
    if is_beyond.any():
        reached["reached_in"] = names[rows.file[np.argmax(is_beyond)]]
        reached.update(words_taken=rows.num_words, words_next=rows.words_next)
        reached["files_not_read"] = len(names) - last - 1
    rejected = np.bincount(code[code >= REJECTED] - REJECTED, minlength=len(rows.reasons)).tolist()
    per_file, rejected_per_file = (
        dict(zip(names, np.bincount(files, minlength=last + 1).tolist(), strict=False))
        for files in (rows.file, rows.file[code >= REJECTED])
    )
    counts = {
        "documents_read": len(code),
        "documents_per_file": per_file,
        "documents_beyond_limit": int(is_beyond.sum()),
        "word_limit": {"words": word_limit, **reached} if word_limit else None,
        "rejected": {n: m for n, m in sorted(zip(rows.reasons, rejected, strict=True)) if m},
        "rejected_per_file": {n: m for n, m in rejected_per_file.items() if m},
    }
    num_cut = int((code == CUT).sum())
    return DocumentDecisions(units, rows.per_unit, rows.reasons, split, num_cut, counts)


class _Rows(NamedTuple):
    """What the unit files say of every row; `per_unit` are views of `code`."""

    per_unit: list[np.ndarray]
    code: np.ndarray
    position: np.ndarray
    num_bytes: np.ndarray
    file: np.ndarray
    reasons: list[str]
    num_words: int
    words_next: int


def _read_rows(units: Sequence[Unit], job: UnitJob, word_limit: int | None) -> _Rows:
    """Reads the units up to the one in which the word limit is reached."""
    reasons = ["duplicate", "near duplicate"]
    columns: dict[str, list[np.ndarray]] = {"code": [], "position": [], "bytes": [], "file": []}
    num_words = words_next = 0
    for unit in units:
        batches, summary = open_unit(unit, job)
        reasons += [reason for reason in summary.reasons if reason not in reasons]
        codes = [REJECTED + reasons.index(reason) for reason in summary.reasons]
        # Reason -1, of the rows that are kept, is the last one here.
        code = np.array([*codes, TRAIN], np.int16)[read_column(batches, "reason")]
        words = read_column(batches, "words")
        if word_limit is not None:
            is_beyond = num_words + np.cumsum(words) > word_limit
            code[is_beyond] = BEYOND
            words_next = int(words[is_beyond][0]) if is_beyond.any() else 0
            words = words[~is_beyond]
        num_words += int(words.sum())
        columns["code"].append(code)
        for name in ("position", "bytes", "file"):
            columns[name].append(read_column(batches, name))
        if words_next:
            break
    ends = np.cumsum([len(code) for code in columns["code"]])
    code, position, num_bytes, file = map(np.concatenate, columns.values())
    per_unit = np.split(code, ends[:-1])
    return _Rows(per_unit, code, position, num_bytes, file, reasons, num_words, words_next)


def _reject_repeated(code: np.ndarray, keys: np.ndarray, reason: int) -> None:
    """Marks the documents whose key an earlier one has, itself a near duplicate or not."""
    places = np.flatnonzero((code == TRAIN) | (code == _NEAR_DUPLICATE))
    code[places[duplicated(keys[places])]] = reason
