"""Units of work: parts of the source that are read, cleaned and encoded by themselves.

The plan of units depends on the source alone, never on the number of workers. A finished unit is
one file, which says which unit of which work it is, so that no other is taken for it.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from kiem.data.arrow import from_numpy
from kiem.data.clean.cleaner import Cleaning
from kiem.data.clean.near_duplicates import band_keys, band_names
from kiem.data.clean.ngrams import WordHashes
from kiem.data.prepare.packing import frame
from kiem.data.prepare.split import split_position
from kiem.data.prepare.unit_files import SCHEMA, UnitSummary, find_damage, read_unit, write_unit
from kiem.data.read.readers import FilePart, list_parts, place, read_parts
from kiem.data.read.rows import Document
from kiem.data.read.section import reading_errors
from kiem.data.read.sources import Source, count_words
from kiem.tokenizer.encoding import Encoder

UNIT_BYTES = 4_000_000
_BATCH_CHARACTERS = 8_000_000
_ROW_CHARACTERS = 100


class Unit(NamedTuple):
    """Consecutive parts of the source.

    Attributes:
        number: its place in the plan.
        parts: what is read, in order.
        num_bytes: about how much of the files that is, for progress.
    """

    number: int
    parts: tuple[FilePart, ...]
    num_bytes: int


@dataclass(frozen=True)
class Reading:
    """How the source is read.

    Attributes:
        source: where the text is.
        text_column: the column or key that holds the text.
        on_bad_document: what to do at a row that is no document.
    """

    source: Source
    text_column: str
    on_bad_document: Literal["stop", "skip"]


@dataclass(frozen=True)
class UnitJob:
    """What is done with every unit.

    Attributes:
        folder: where unit files go.
        identity: of all that their content depends on.
        reading: how the source is read.
        seed: of the split.
        bos_id: put before every document.
        eos_id: put after every document.
        cleaning: what is normalized and rejected.
    """

    folder: Path
    identity: str
    reading: Reading
    seed: int
    bos_id: int
    eos_id: int
    cleaning: Cleaning

    def path(self, unit: Unit) -> Path:
        """Returns the file that a finished unit becomes."""
        return self.folder / f"{unit.number:06d}.unit"

    def key(self, unit: Unit) -> str:
        """Returns what is in the file of a unit and in no other, as 64 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode((self.identity, unit))).hexdigest()


def plan_units(source: Source) -> list[Unit]:
    """Returns the units of a source; raises a UserError at a file that cannot be read."""
    units: list[Unit] = []
    parts: list[FilePart] = []
    num_bytes = 0
    for part in list_parts(source, UNIT_BYTES):
        if parts and num_bytes + part.num_bytes > UNIT_BYTES:
            units.append(Unit(len(units), tuple(parts), num_bytes))
            parts, num_bytes = [], 0
        parts.append(part)
        num_bytes += part.num_bytes
    return [*units, Unit(len(units), tuple(parts), num_bytes)]


def finish_unit(unit: Unit, job: UnitJob, encoder: Encoder) -> UnitSummary:
    """Makes the file of a unit, unless it is there and sound already.

    Raises:
        UserError: bad input, an encoding that is not exact, or a disk that cannot be written.
    """
    path = job.path(unit)
    if find_fault(unit, job) is None:
        return read_unit(path)[1]
    maker = _UnitMaker(unit, job, encoder)
    write_unit(path, maker.batches(), maker.summary, _schema(job))
    return maker.summary


def find_fault(unit: Unit, job: UnitJob) -> str | None:
    """Returns why the file of a unit cannot be used; None if it is there, sound and the right one.

    The reason goes on behind the file's name.
    """
    path = job.path(unit)
    if (fault := find_damage(path)) is not None:
        return fault
    with reading_errors(str(path)):
        try:
            key = read_unit(path)[1].key
        except (pa.ArrowException, msgspec.MsgspecError, KeyError, TypeError):
            return "is no file of this program"
        return None if key == job.key(unit) else "belongs to other work"


class _UnitMaker:
    """Turns the rows of one unit into record batches and counts them."""

    def __init__(self, unit: Unit, job: UnitJob, encoder: Encoder):
        self._unit = unit
        self._job = job
        self._encoder = encoder
        self._hashes = WordHashes()
        self._sources: dict[str, int] = {}
        self._reasons: dict[str, int] = {}
        self._rows: Counter[FilePart] = Counter()
        self.summary = UnitSummary(job.key(unit), [], [], [], 0, 0, 0, 0, {})

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the batches; the summary is complete after the last one."""
        started = time.perf_counter()
        for rows in row_batches(read_unit_rows(self._unit, self._job.reading)):
            started = self._took("reading", started)
            self._rows.update(part for part, _ in rows)
            yield self._encode(rows)
            started = time.perf_counter()
        self.summary.rows = [self._rows[part] for part in self._unit.parts]
        self.summary.sources = list(self._sources)
        self.summary.reasons = list(self._reasons)

    def _encode(self, rows: list[tuple[FilePart, Document]]) -> pa.RecordBatch:
        started = time.perf_counter()
        cleaned = self._job.cleaning.clean([row for _, row in rows], self._hashes)
        started = self._took("cleaning", started)
        is_kept = np.array([reason is None for _, reason in cleaned])
        kept = [found for found, (_, reason) in zip(rows, cleaned, strict=True) if reason is None]
        texts = [text for text, reason in cleaned if reason is None]
        num_bytes = np.array([len(text.encode()) for text in texts], np.int64)
        num_words = np.array([count_words(text) for text in texts], np.int64)
        positions = np.array([split_position(t, self._job.seed) for t in texts], np.uint64)
        started = self._took("counting", started)
        bands = []
        if self._job.cleaning.near_duplicates:
            keys = _spread(band_keys(texts, self._hashes), is_kept)
            bands = [from_numpy(band) for band in keys.T]
            started = self._took("near duplicates", started)
        encoded = self._encoder.encode(texts, lambda number: _place(self._job, kept[number]))
        framed = frame(encoded, self._job.bos_id, self._job.eos_id)
        started = self._took("encoding", started)
        summary = self.summary
        summary.documents += len(texts)
        summary.words += int(num_words.sum())
        summary.bytes += int(num_bytes.sum())
        summary.tokens += len(framed.ids)
        lengths = _spread(framed.lengths, is_kept)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        reasons = [-1 if r is None else self._number(self._reasons, r) for _, r in cleaned]
        sources = [self._number(self._sources, row.source) for _, row in rows]
        columns = [
            pa.LargeListArray.from_arrays(from_numpy(offsets), from_numpy(framed.ids)),
            from_numpy(_spread(positions, is_kept)),
            from_numpy(_spread(num_words, is_kept)),
            from_numpy(_spread(num_bytes, is_kept)),
            from_numpy(np.array(sources, np.int32)),
            from_numpy(np.array(reasons, np.int32)),
            *bands,
        ]
        return pa.record_batch(columns, schema=_schema(self._job))

    def _took(self, stage: str, started: float) -> float:
        now = time.perf_counter()
        self.summary.seconds[stage] = self.summary.seconds.get(stage, 0.0) + now - started
        return now

    @staticmethod
    def _number(names: dict[str, int], name: str) -> int:
        return names.setdefault(name, len(names))


def read_unit_rows(unit: Unit, reading: Reading) -> Iterator[tuple[FilePart, Document]]:
    """Yields the rows of a unit."""
    return read_parts(reading.source, unit.parts, reading.text_column, reading.on_bad_document)


def _schema(job: UnitJob) -> pa.Schema:
    names = band_names() if job.cleaning.near_duplicates else []
    return pa.schema([*SCHEMA, *((name, pa.uint64()) for name in names)])


def row_batches(
    rows: Iterator[tuple[FilePart, Document]],
) -> Iterator[list[tuple[FilePart, Document]]]:
    """Yields rows in groups of bounded size."""
    batch: list[tuple[FilePart, Document]] = []
    num_characters = 0
    for part, row in rows:
        batch.append((part, row))
        # Rejected rows have no text, but are kept in memory too.
        num_characters += len(row.text) + _ROW_CHARACTERS
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _place(job: UnitJob, found: tuple[FilePart, Document]) -> str:
    part, row = found
    return place(job.reading.source, part, row.number)


def _spread(values: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """Returns values [kept, ...] with zeros at the rejected rows, [rows, ...]."""
    spread = np.zeros((len(is_kept), *values.shape[1:]), values.dtype)
    spread[is_kept] = values
    return spread
