"""The decision about every document: for training, for testing, rejected or beyond the word limit.

It is made in one process and in the order of the plan, so it is the same for any workers. Every
planned unit must be there, up to the one in which the word limit is reached: text is left out
because it was counted, never because its file is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kiem.data.clean.near_duplicates import band_names
from kiem.data.clean.ngrams import duplicated
from kiem.data.prepare.split import CUT, TEST, TRAIN, Split, decide_split
from kiem.data.prepare.units import Job, Unit, open_unit, read_column, read_unit

# Further decisions. REJECTED and what is above it are the reasons by number.
BEYOND, REJECTED = 3, 4
_DUPLICATE, _NEAR_DUPLICATE = REJECTED, REJECTED + 1
SORTED_AT_ONCE = 1 << 21  # keys; each takes some 70 bytes meanwhile


class DocumentDecisions(NamedTuple):
    """The decisions about the rows of the units up to the one in which the word limit is reached.

    Attributes:
        units: those units.
        per_unit: int16 [rows] for each of them: TRAIN, TEST, CUT (the end for testing, the
            rest for training), BEYOND the word limit, or REJECTED plus the number of the reason.
        rows_before: how many lines or rows of its first file each unit leaves to earlier units.
        reasons: why rows are rejected.
        split: where the test split ends.
        num_cut: documents that are cut.
        counts: the manifest's entries about all rows that were read.
    """

    units: Sequence[Unit]
    per_unit: list[np.ndarray]
    rows_before: list[int]
    reasons: list[str]
    split: Split
    num_cut: int
    counts: dict[str, Any]

    def by_unit(self) -> Iterator[tuple[Unit, np.ndarray, int]]:
        """Yields each unit with its decisions and the rows before it."""
        return zip(self.units, self.per_unit, self.rows_before, strict=True)


def decide(job: Job) -> DocumentDecisions:
    """Decides about every row of finished units.

    Documents are taken as long as they have no more words together than the word limit. Raises a
    UserError if a unit file is missing, damaged or of other work.
    """
    per_unit, rows_before, reasons, limit = _read_units(job)
    units, ends = job.units[: len(per_unit)], np.cumsum([len(part) for part in per_unit])
    code = np.concatenate(per_unit)  # int16 [documents]; with one column of keys, all that grows
    per_unit = np.split(code, ends[:-1])  # views: what changes in `code` changes there
    # Reject what came before. Equal texts have equal positions; that two different ones have, too,
    # is to be expected once in some 6 billion documents, since positions are hashes of 64 bits.
    if job.cleaning.language is not None:
        _reject_repeated(job, units, code, "position", _DUPLICATE)
    if job.cleaning.near_duplicates:
        for name in band_names():
            _reject_repeated(job, units, code, name, _NEAR_DUPLICATE)
    # Split what is kept.
    read = partial(_with_columns, job, units, per_unit)
    columns = read("position", "bytes")
    kept = ([column[part == TRAIN] for column in found] for found, part in columns)
    split = decide_split(kept, job.options.test_split, job.options.chunk_size)
    for (position,), part in read("position"):
        is_kept = part == TRAIN
        part[is_kept & (position < np.uint64(split.limit))] = TEST
        if split.cut_bytes is not None:
            part[is_kept & (position == np.uint64(split.limit))] = CUT
    # Count, per reason and per file.
    names = [file.name for file in job.source.files[: units[-1].parts[-1].file + 1]]
    per_file, rejected_per_file = np.zeros((2, len(names)), np.int64)
    for (files,), part in read("file"):
        np.add.at(per_file, files, 1)
        np.add.at(rejected_per_file, files[part >= REJECTED], 1)
    rejected = np.bincount(code[code >= REJECTED] - REJECTED, minlength=len(reasons))
    counts = {
        "documents_read": len(code),
        "documents_per_file": _by_name(names, per_file),
        "documents_beyond_limit": int(np.count_nonzero(code == BEYOND)),
        "word_limit": limit,
        "rejected": {n: m for n, m in sorted(_by_name(reasons, rejected).items()) if m},
        "rejected_per_file": {n: m for n, m in _by_name(names, rejected_per_file).items() if m},
    }
    if kinds := job.cleaning.personal_data:
        replaced = np.zeros(len(kinds), np.int64)
        for found, part in read(*kinds):
            replaced += [column[part < BEYOND].sum() for column in found]
        counts["personal_data_replaced"] = _by_name(kinds, replaced)
    num_cut = int(np.count_nonzero(code == CUT))
    return DocumentDecisions(units, per_unit, rows_before, reasons, split, num_cut, counts)


def _by_name(names: Sequence[str], numbers: np.ndarray) -> dict[str, int]:
    return dict(zip(names, numbers.tolist(), strict=True))


def _read_units(
    job: Job,
) -> tuple[list[np.ndarray], list[int], list[str], dict[str, Any] | None]:
    """Reads the units up to the one in which the word limit is reached.

    Returns:
        For each of them the decisions that are known without the others; the rows of its first file
        before it; the reasons; and the manifest's entry about the limit.
    """
    per_unit: list[np.ndarray] = []
    reasons = ["duplicate", "near duplicate"]
    word_limit = job.word_limit
    limit: dict[str, Any] = {"words": word_limit} if word_limit else {}
    num_words = num_rows = 0
    rows_before: list[int] = []
    file = -1
    for unit in job.units:
        batches, summary = open_unit(unit, job)
        # Add up the lines or rows of the file that goes on from unit to unit.
        first, last = unit.parts[0].file, unit.parts[-1].file
        rows_before.append(num_rows if first == file else 0)
        num_rows = summary.rows + (rows_before[-1] if first == last else 0)
        file = last
        reasons += [reason for reason in summary.reasons if reason not in reasons]
        codes = [REJECTED + reasons.index(reason) for reason in summary.reasons]
        # Reason -1, of the rows that are kept, is the last one here.
        code = np.array([*codes, TRAIN], np.int16)[read_column(batches, "reason")]
        per_unit.append(code)
        if word_limit is not None and num_words + summary.words > word_limit:
            ends = num_words + np.cumsum(read_column(batches, "words"))
            beyond = int(np.searchsorted(ends, word_limit, side="right"))
            code[beyond:] = BEYOND
            num_words = int(ends[beyond - 1]) if beyond else num_words
            limit |= {
                "reached_in": job.source.files[read_column(batches, "file")[beyond]].name,
                "words_taken": num_words,
                "words_next": int(ends[beyond]) - num_words,
                "files_not_read": len(job.source.files) - unit.parts[-1].file - 1,
            }
            break
        num_words += summary.words
    return per_unit, rows_before, reasons, limit or None


def _with_columns(
    job: Job, units: Sequence[Unit], per_unit: Sequence[np.ndarray], *names: str
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yields columns of each unit's file, and its decisions."""
    for unit, part in zip(units, per_unit, strict=True):
        batches, _ = read_unit(job.path(unit))
        yield [read_column(batches, name) for name in names], part


def _reject_repeated(
    job: Job, units: Sequence[Unit], code: np.ndarray, name: str, reason: int
) -> None:
    """Marks the documents whose key an earlier one has, itself a near duplicate or not.

    The keys are the column `name`, hashes, so each of equal ranges has about as many. They are
    sorted range by range, which bounds the memory that sorting takes besides the keys.
    """
    keys = np.empty(len(code), np.uint64)
    start = 0
    for unit in units:
        column = read_column(read_unit(job.path(unit))[0], name)
        keys[start : start + len(column)] = column
        start += len(column)
    num_ranges = max(1, -(-len(keys) // SORTED_AT_ONCE))
    lowest = np.array([number * 2**64 // num_ranges for number in range(num_ranges)], np.uint64)
    for low, high in zip(lowest, [*lowest[1:] - np.uint64(1), np.uint64(2**64 - 1)], strict=True):
        found = []
        for start in range(0, len(keys), SORTED_AT_ONCE):
            here = slice(start, start + SORTED_AT_ONCE)
            is_open = (code[here] == TRAIN) | (code[here] == _NEAR_DUPLICATE)
            found.append(
                start + np.flatnonzero(is_open & (low <= keys[here]) & (keys[here] <= high))
            )
        places = np.concatenate(found)
        code[places[duplicated(keys[places])]] = reason
