"""What becomes of every row: which document is for training, for testing, or left out.

This is decided in one process and in the order of the plan, so it is the same whatever worker made
which unit. Every unit that is planned must be there, up to the one in which the word limit is
reached: text is left out because it was counted, never because its file is not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kiem.data.clean.near_duplicates import band_names
from kiem.data.clean.ngrams import duplicated
from kiem.data.prepare.split import Split, decide_split
from kiem.data.prepare.unit_files import bad_unit, read_columns, read_unit
from kiem.data.prepare.units import Unit, UnitJob, find_fault

TRAIN, TEST, CUT, _REJECTED, _BEYOND, _DUPLICATE, _NEAR_DUPLICATE = range(7)
_LIKENESS = {_DUPLICATE: "duplicate", _NEAR_DUPLICATE: "near duplicate"}
_LEFT_OUT = (_REJECTED, _DUPLICATE, _NEAR_DUPLICATE)


class ReachedLimit(NamedTuple):
    """Where the word limit is, as the manifest says it.

    Attributes:
        reached_in: the file that has the first document that is too much.
        words_taken: of all documents before that.
        words_next: of that document.
        files_not_read: files after the last one that was read from.
    """

    reached_in: str
    words_taken: int
    words_next: int
    files_not_read: int


@dataclass(frozen=True)
class Fates:
    """What becomes of every row of the units up to the one in which the word limit is reached.

    Attributes:
        per_unit: int8 [rows] for each of those units: TRAIN, TEST, CUT (the end for testing, the
            rest for training), or left out.
        split: where the test split ends.
        rejected: rows rejected, by reason.
        num_rows: all rows of those units.
        num_cut: documents that are cut.
        num_beyond: rows beyond the word limit.
        rows_per_file: rows of every file that is in those units, in the order of the source.
        rejected_per_file: those of them that are rejected, of files that have such.
        limit: how the word limit left documents out; None if it did not.
    """

    per_unit: list[np.ndarray]
    split: Split
    rejected: Counter[str]
    num_rows: int
    num_cut: int
    num_beyond: int
    rows_per_file: dict[str, int]
    rejected_per_file: dict[str, int]
    limit: ReachedLimit | None


def decide(
    units: Sequence[Unit], job: UnitJob, test_share: float, chunk_size: int, word_limit: int | None
) -> Fates:
    """Decides what becomes of every row of the units.

    Args:
        units: the plan.
        job: where the finished units are.
        test_share: share of the documents for testing.
        chunk_size: tokens in a chunk.
        word_limit: documents are taken as long as they have no more words together.

    Raises:
        UserError: a unit file is missing, damaged or that of other work.
    """
    fates: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    rejected: Counter[str] = Counter()
    num_words = words_next = 0
    for unit in units:
        if (fault := find_fault(unit, job)) is not None:
            raise bad_unit(job.path(unit), fault)
        names = ("position", "words", "bytes", "reason")
        columns, summary = read_columns(job.path(unit), names)
        words, reasons = columns["words"], columns["reason"]
        fate = np.where(reasons >= 0, _REJECTED, TRAIN).astype(np.int8)
        if word_limit is not None:
            too_far = num_words + np.cumsum(words) > word_limit
            fate[np.logical_or.accumulate(too_far)] = _BEYOND
            words_next = int(words[too_far][0]) if too_far.any() else 0
        num_words += int(words[fate != _BEYOND].sum())
        for reason, number in enumerate(np.bincount(reasons[fate == _REJECTED]).tolist()):
            rejected[summary.reasons[reason]] += number
        fates.append(fate)
        positions.append(columns["position"])
        sizes.append(columns["bytes"])
        if (fate == _BEYOND).any():
            break
    # Equal texts have equal positions. That two different ones have, too, is to be expected once
    # in some 6 billion documents, since positions are hashes of 64 bits.
    if job.cleaning.filters != "none":
        _reject_repeated(fates, positions, _DUPLICATE)
    if job.cleaning.near_duplicates:
        for name in band_names():
            paths = [job.path(unit) for unit in units[: len(fates)]]
            keys = [read_columns(path, (name,))[0][name] for path in paths]
            _reject_repeated(fates, keys, _NEAR_DUPLICATE)
    for code, likeness in _LIKENESS.items():
        rejected[likeness] += _count(fates, code)
    split = _decide_split(fates, positions, sizes, test_share, chunk_size)
    files, all_fates = _files_of_rows(units, job, fates), np.concatenate(fates)
    file_names = job.reading.source.names
    last = max(part.file for unit in units[: len(fates)] for part in unit.parts)
    rows_per_file, rejected_per_file = (
        dict(zip(file_names[: last + 1], np.bincount(of, minlength=last + 1).tolist(), strict=True))
        for of in (files, files[np.isin(all_fates, _LEFT_OUT)])
    )
    limit_reached = None
    if (is_beyond := all_fates == _BEYOND).any():
        file = file_names[files[np.argmax(is_beyond)]]
        limit_reached = ReachedLimit(file, num_words, words_next, len(file_names) - last - 1)
    return Fates(
        fates,
        split,
        +rejected,
        num_rows=sum(map(len, fates)),
        num_cut=_count(fates, CUT),
        num_beyond=_count(fates, _BEYOND),
        rows_per_file=rows_per_file,
        rejected_per_file={name: number for name, number in rejected_per_file.items() if number},
        limit=limit_reached,
    )


def _count(fates: list[np.ndarray], code: int) -> int:
    return sum(int(np.count_nonzero(fate == code)) for fate in fates)


def _decide_split(
    fates: list[np.ndarray],
    positions: list[np.ndarray],
    sizes: list[np.ndarray],
    test_share: float,
    chunk_size: int,
) -> Split:
    """Marks the kept documents that are for testing, or cut for it."""
    is_kept = [fate == TRAIN for fate in fates]
    split = decide_split(
        np.concatenate([p[here] for p, here in zip(positions, is_kept, strict=True)]),
        np.concatenate([size[here] for size, here in zip(sizes, is_kept, strict=True)]),
        test_share,
        chunk_size,
    )
    limit = np.uint64(split.limit)
    for fate, position in zip(fates, positions, strict=True):
        if split.cut_bytes is not None:
            fate[(fate == TRAIN) & (position == limit)] = CUT
        fate[(fate == TRAIN) & (position < limit)] = TEST
    return split


def _files_of_rows(units: Sequence[Unit], job: UnitJob, fates: list[np.ndarray]) -> np.ndarray:
    """Returns which file of the source every row is from, int64 [rows]."""
    files = []
    for unit, fate in zip(units, fates, strict=False):
        summary = read_unit(job.path(unit))[1]
        files.append(np.repeat([part.file for part in unit.parts], summary.rows))
        assert len(files[-1]) == len(fate), f"{len(fate)} rows in a unit of {len(files[-1])}"
    return np.concatenate(files)


def _reject_repeated(fates: list[np.ndarray], keys: list[np.ndarray], code: int) -> None:
    """Marks the documents whose key an earlier one has, itself left out for likeness or not."""
    is_document = [(fate == TRAIN) | (fate == _NEAR_DUPLICATE) for fate in fates]
    chosen = [key[here].astype(np.uint64) for key, here in zip(keys, is_document, strict=True)]
    is_again = duplicated(np.concatenate(chosen))
    start = 0
    for fate, here in zip(fates, is_document, strict=True):
        places = np.flatnonzero(here)
        fate[places[is_again[start : start + len(places)]]] = code
        start += len(places)


def rejection_reasons(path: Path, fate: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Returns why the rows of a unit are rejected.

    Args:
        path: the unit file.
        fate: int8 [rows], what becomes of them.

    Returns:
        For each row which of the reasons it is, int32 [rows], -1 if it is not rejected; and the
        reasons.
    """
    columns, summary = read_columns(path, ("reason",))
    which = np.where(fate == _REJECTED, columns["reason"], np.int32(-1))
    for number, code in enumerate(_LIKENESS, start=len(summary.reasons)):
        which[fate == code] = number
    return which, [*summary.reasons, *_LIKENESS.values()]
