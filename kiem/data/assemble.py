"""From finished units to the two splits: what is kept, where it goes, chunks on the disk.

This runs in one process and in the order of the plan, so it decides the same whatever worker made
which unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from kiem.data.arrow import to_numpy
from kiem.data.chunks import NO_SOURCE, TEST_SOURCES, SplitWriter
from kiem.data.near_duplicates import band_names
from kiem.data.packing import make_packer
from kiem.data.split import split_limit
from kiem.data.tokenizer import Tokenizer
from kiem.data.units import Unit, UnitJob, UnitSummary, read_unit
from kiem.data.words import came_before
from kiem.errors import ExitCode, UserError
from kiem.files import check_seal

SPLITS = ("train", "test")
_TRAIN, _TEST, _REJECTED, _BEYOND, _DUPLICATE, _NEAR_DUPLICATE = range(6)
_LIKENESS = {_DUPLICATE: "duplicate", _NEAR_DUPLICATE: "near duplicate"}


@dataclass
class SplitCounts:
    """What went into one split."""

    documents: int = 0
    words: int = 0
    bytes: int = 0
    tokens: int = 0
    chunks: int = 0
    padding_tokens: int = 0
    documents_per_source: Counter[str] = field(default_factory=Counter)
    tokens_per_source: Counter[str] = field(default_factory=Counter)
    bytes_per_source: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Fates:
    """What becomes of every row.

    Attributes:
        per_unit: int8 [rows] for each unit: train, test, rejected, beyond the word limit, or like
            an earlier document.
        rejected: rows rejected, by reason.
        num_rows: rows up to the word limit.
    """

    per_unit: list[np.ndarray]
    rejected: Counter[str]
    num_rows: int


def decide(units: Sequence[Unit], job: UnitJob, test_share: float, word_limit: int | None) -> Fates:
    """Decides what becomes of every row of the units.

    Args:
        units: the plan.
        job: where the finished units are.
        test_share: share of the documents for testing.
        word_limit: documents are taken as long as they have no more words together.

    Raises:
        UserError: a unit file is damaged.
    """
    fates: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    rejected: Counter[str] = Counter()
    num_rows = num_words = 0
    for unit in units:
        path = job.path(unit)
        if not path.exists():
            break  # beyond the word limit
        if not check_seal(path):
            raise UserError(
                "is damaged (its sha256 differs)",
                where=str(path),
                fix="Run the same command again: this part is made anew.",
                exit_code=ExitCode.DAMAGED,
            )
        columns, summary = _read_columns(path, ("position", "words", "reason"))
        words, reasons = columns["words"], columns["reason"]
        fate = np.where(reasons >= 0, _REJECTED, _TRAIN).astype(np.int8)
        if word_limit is not None:
            too_far = num_words + np.cumsum(words) > word_limit
            fate[np.logical_or.accumulate(too_far)] = _BEYOND
        counted = fate != _BEYOND
        num_words += int(words[counted].sum())
        num_rows += int(counted.sum())
        for reason in reasons[fate == _REJECTED]:
            rejected[summary.reasons[reason]] += 1
        fates.append(fate)
        positions.append(columns["position"])
        if not counted.all():
            break
    # Equal texts have equal positions. That two different ones have, too, is to be expected once
    # in some 6 billion documents, since positions are hashes of 64 bits.
    if job.cleaning.filters != "none":
        _reject_repeated(fates, positions, _DUPLICATE)
    if job.cleaning.near_duplicates:
        for name in band_names():
            paths = [job.path(unit) for unit in units[: len(fates)]]
            keys = [_read_columns(path, (name,))[0][name] for path in paths]
            _reject_repeated(fates, keys, _NEAR_DUPLICATE)
    for code, reason in _LIKENESS.items():
        if number := sum(int((fate == code).sum()) for fate in fates):
            rejected[reason] += number
    lowest = min(
        int(position[fate == _TRAIN].min(initial=2**64 - 1))
        for fate, position in zip(fates, positions, strict=True)
    )
    limit = np.uint64(min(split_limit(test_share, lowest), 2**64 - 1))
    for fate, position in zip(fates, positions, strict=True):
        fate[(fate == _TRAIN) & (position < limit)] = _TEST
    return Fates(fates, rejected, num_rows)


def _reject_repeated(fates: list[np.ndarray], keys: list[np.ndarray], code: int) -> None:
    """Marks the documents whose key an earlier one has, itself left out for likeness or not."""
    is_document = [(fate == _TRAIN) | (fate == _NEAR_DUPLICATE) for fate in fates]
    chosen = [key[here].astype(np.uint64) for key, here in zip(keys, is_document, strict=True)]
    is_again = came_before(np.concatenate(chosen))
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
    columns, summary = _read_columns(path, ("reason",))
    which = np.where(fate == _REJECTED, columns["reason"], np.int32(-1))
    for number, code in enumerate(_LIKENESS, start=len(summary.reasons)):
        which[fate == code] = number
    return which, [*summary.reasons, *_LIKENESS.values()]


def write_splits(
    units: Sequence[Unit],
    job: UnitJob,
    fates: Fates,
    tokenizer: Tokenizer,
    chunk_size: int,
    packing: Literal["concat", "best-fit"],
    folder: Path,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Packs the documents into chunks and writes both splits.

    Args:
        units: the plan.
        job: where the finished units are.
        fates: what becomes of every row.
        tokenizer: whose padding fills the ends.
        chunk_size: tokens in a chunk.
        packing: how documents become chunks.
        folder: the unfinished chunk directory.

    Returns:
        The manifest's entry of each split, and how many rows of the vocabulary no token has.
    """
    writers = {split: SplitWriter(folder / split, chunk_size) for split in SPLITS}
    packers = {split: make_packer(packing, chunk_size, tokenizer.pad_id) for split in SPLITS}
    counts = {split: SplitCounts() for split in SPLITS}
    # Packed as the test tokens are: beside each token, which source its document is from.
    source_writer = SplitWriter(folder / TEST_SOURCES, chunk_size, column="source")
    source_packer = make_packer(packing, chunk_size, NO_SOURCE)
    source_numbers: dict[str, int] = {}
    used = np.zeros(tokenizer.num_rows, dtype=bool)
    for unit, fate in zip(units, fates.per_unit, strict=False):
        path = job.path(unit)
        batches, summary = read_unit(path)
        start = 0
        for batch in batches:
            here = fate[start : start + batch.num_rows]
            start += batch.num_rows
            for number, split in enumerate(SPLITS):
                is_here = here == number
                if not is_here.any():
                    continue
                ids, lengths = _documents(batch, is_here)
                used[ids] = True
                packers[split].add(ids, lengths)
                writers[split].write(packers[split].full_chunks())
                _count(counts[split], batch, is_here, summary.sources)
                if split == "test":
                    labels = to_numpy(batch.column("source"))[is_here]
                    numbers = _source_numbers(labels, summary.sources, source_numbers)
                    source_packer.add(np.repeat(numbers, lengths), lengths)
                    source_writer.write(source_packer.full_chunks())
    entries = {}
    for split in SPLITS:
        writers[split].write(packers[split].last_chunks())
        shards = writers[split].close()
        count = counts[split]
        count.chunks = sum(shard["chunks"] for shard in shards)
        count.padding_tokens = count.chunks * chunk_size - count.tokens
        assert count.padding_tokens == packers[split].num_padding_tokens, "tokens were lost"
        entries[split] = {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for name, value in vars(count).items()
        }
        entries[split]["shards"] = shards
    source_writer.write(source_packer.last_chunks())
    entries["test"]["source_names"] = list(source_numbers)
    entries["test"]["source_shards"] = source_writer.close()
    return entries, int(tokenizer.num_rows - used.sum())


def _documents(batch: pa.RecordBatch, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of the chosen rows, one after the other, and the length of each."""
    column = batch.column("ids")
    lengths = np.diff(to_numpy(column.offsets))
    ids = to_numpy(column.values)
    if chosen.all():
        return ids, lengths
    return ids[np.repeat(chosen, lengths)], lengths[chosen]


def _source_numbers(labels: np.ndarray, sources: list[str], numbers: dict[str, int]) -> np.ndarray:
    """Returns the number of each document's source, int32 [documents]; new ones get the next.

    Args:
        labels: places in `sources`, int [documents].
        sources: of the unit.
        numbers: of the sources so far; grows.
    """
    found = np.unique(labels)
    here = np.zeros(len(sources), dtype=np.int32)
    here[found] = [numbers.setdefault(sources[label], len(numbers)) for label in found]
    return here[labels]


def _count(
    counts: SplitCounts, batch: pa.RecordBatch, chosen: np.ndarray, sources: list[str]
) -> None:
    num_bytes = to_numpy(batch.column("bytes"))[chosen]
    labels = to_numpy(batch.column("source"))[chosen]
    counts.documents += int(chosen.sum())
    counts.words += int(to_numpy(batch.column("words"))[chosen].sum())
    counts.bytes += int(num_bytes.sum())
    num_tokens = np.diff(to_numpy(batch.column("ids").offsets))[chosen]
    counts.tokens += int(num_tokens.sum())
    for label in np.unique(labels):
        name, is_from = sources[label], labels == label
        counts.documents_per_source[name] += int(is_from.sum())
        counts.tokens_per_source[name] += int(num_tokens[is_from].sum())
        counts.bytes_per_source[name] += int(num_bytes[is_from].sum())


def _read_columns(path: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], UnitSummary]:
    """Returns whole columns of a unit file, as copies, and its summary."""
    batches, summary = read_unit(path)
    columns = {
        name: np.concatenate([to_numpy(batch.column(name)) for batch in batches]) for name in names
    }
    return columns, summary
