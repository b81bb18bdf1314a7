"""The decision about every document: for training, for testing, rejected or beyond the word limit.

It is made in one process and in the order of the plan, so it is the same for any workers. Every
planned unit must be there, up to the one in which the word limit is reached: text is left out
because it was counted, never because its file is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kiem.data.clean.near_duplicates import band_names
from kiem.data.clean.ngrams import duplicated
from kiem.data.prepare.split import CUT, TEST, TRAIN, Split, decide_split
from kiem.data.prepare.units import Job, Unit, open_unit, read_column, read_unit

# Further decisions. REJECTED and what is above it are the reasons by number.
BEYOND, REJECTED = 3, 4
_DUPLICATE, _NEAR_DUPLICATE = REJECTED, REJECTED + 1


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
    columns, rows_before, reasons, limit = _read_units(job)
    code, position, num_bytes, in_file = (np.concatenate(parts) for parts in columns.values())
    units = job.units[: len(columns["code"])]
    # Reject what came before. Equal texts have equal positions; that two different ones have, too,
    # is to be expected once in some 6 billion documents, since positions are hashes of 64 bits.
    if job.cleaning.language is not None:
        _reject_repeated(code, position, _DUPLICATE)
    if job.cleaning.near_duplicates:
        for name in band_names():
            bands = [read_column(read_unit(job.path(unit))[0], name) for unit in units]
            _reject_repeated(code, np.concatenate(bands), _NEAR_DUPLICATE)
    # Split what is kept.
    is_kept = code == TRAIN
    how = (job.options.test_split, job.options.chunk_size)
    split = decide_split(position[is_kept], num_bytes[is_kept], *how)
    code[is_kept & (position < np.uint64(split.limit))] = TEST
    if split.cut_bytes is not None:
        code[is_kept & (position == np.uint64(split.limit))] = CUT
    # Count, per reason and per file.
    names = [file.name for file in job.source.files[: units[-1].parts[-1].file + 1]]
    is_rejected = code >= REJECTED
    rejected = np.bincount(code[is_rejected] - REJECTED, minlength=len(reasons)).tolist()
    per_file, rejected_per_file = (
        dict(zip(names, np.bincount(files, minlength=len(names)).tolist(), strict=True))
        for files in (in_file, in_file[is_rejected])
    )
    counts = {
        "documents_read": len(code),
        "documents_per_file": per_file,
        "documents_beyond_limit": int(np.count_nonzero(code == BEYOND)),
        "word_limit": limit,
        "rejected": {n: m for n, m in sorted(zip(reasons, rejected, strict=True)) if m},
        "rejected_per_file": {n: m for n, m in rejected_per_file.items() if m},
    }
    per_unit = np.split(code, np.cumsum([len(part) for part in columns["code"]])[:-1])
    if job.cleaning.personal_data:
        counts["personal_data_replaced"] = _count_replaced(job, units, per_unit)
    num_cut = int(np.count_nonzero(code == CUT))
    return DocumentDecisions(units, per_unit, rows_before, reasons, split, num_cut, counts)


def _read_units(
    job: Job,
) -> tuple[dict[str, list[np.ndarray]], list[int], list[str], dict[str, Any] | None]:
    """Reads the units up to the one in which the word limit is reached.

    Returns:
        For each of them the decisions that are known without the others and some columns; the rows
        of its first file before it; the reasons; and the manifest's entry about the limit.
    """
    columns: dict[str, list[np.ndarray]] = {"code": [], "position": [], "bytes": [], "file": []}
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
        columns["code"].append(code)
        for name in ("position", "bytes", "file"):
            columns[name].append(read_column(batches, name))
        if word_limit is not None and num_words + summary.words > word_limit:
            ends = num_words + np.cumsum(read_column(batches, "words"))
            beyond = int(np.searchsorted(ends, word_limit, side="right"))
            code[beyond:] = BEYOND
            num_words = int(ends[beyond - 1]) if beyond else num_words
            limit |= {
                "reached_in": job.source.files[columns["file"][-1][beyond]].name,
                "words_taken": num_words,
                "words_next": int(ends[beyond]) - num_words,
                "files_not_read": len(job.source.files) - unit.parts[-1].file - 1,
            }
            break
        num_words += summary.words
    return columns, rows_before, reasons, limit or None


def _count_replaced(
    job: Job, units: Sequence[Unit], per_unit: Sequence[np.ndarray]
) -> dict[str, int]:
    """Returns how often each kind of personal data is replaced in the documents that are kept."""
    counts = dict.fromkeys(job.cleaning.personal_data, 0)
    for unit, code in zip(units, per_unit, strict=True):
        batches, _ = read_unit(job.path(unit))
        for kind in counts:
            counts[kind] += int(read_column(batches, kind)[code < BEYOND].sum())
    return counts


def _reject_repeated(code: np.ndarray, keys: np.ndarray, reason: int) -> None:
    """Marks the documents whose key an earlier one has, itself a near duplicate or not."""
    places = np.flatnonzero((code == TRAIN) | (code == _NEAR_DUPLICATE))
    code[places[duplicated(keys[places])]] = reason
