"""Units of work: parts of the source that are read, cleaned and encoded on their own.

The plan of units depends on the source alone, never on the number of workers. A finished unit is a
file with a row for every row of the source:

    ids             large_list<int32>   <bos> text <eos>
    position        uint64              in the split
    words, bytes    int64               of the text
    file            int32               number of the file in the source
    row             int64               line or row of the file, from 1, without those of its
                                        earlier units
    source, reason  int32               numbers of names in the summary; reason -1: kept
    band_0 ...      uint64              keys of near duplicates, with --near-duplicates
    email ...       int32               how often it is replaced, with --replace-personal-data

A rejected row counts as an empty text. The last record batch is empty and carries the summary. The
file ends with its SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from kiem.config import PreprocessOptions
from kiem.core.errors import UserError, damaged
from kiem.core.files import check_seal, sealed_file
from kiem.data.arrow import from_numpy, to_numpy
from kiem.data.clean.cleaner import Cleaning
from kiem.data.clean.near_duplicates import band_keys, band_names
from kiem.data.clean.ngrams import WordHashes
from kiem.data.prepare.packing import frame
from kiem.data.prepare.split import split_position
from kiem.data.read.readers import FilePart, list_parts, place, read_parts, rows_before_parts
from kiem.data.read.rows import Document
from kiem.data.read.sources import Source, count_words, word_limit
from kiem.tokenizer.encoding import Encoded, Encoder
from kiem.tokenizer.tokenizer import Tokenizer

UNIT_BYTES = 4_000_000
# Increased whenever an older version would have made other unit files.
UNIT_VERSION = 8
SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.int32())),
        ("position", pa.uint64()),
        ("words", pa.int64()),
        ("bytes", pa.int64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("source", pa.int32()),
        ("reason", pa.int32()),
    ]
)
_BATCH_CHARACTERS = 8_000_000
_ROW_CHARACTERS = 100  # for what a row takes besides its text

Rows = list[tuple[FilePart, Document]]


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


class UnitSummary(msgspec.Struct):
    """Names and counts of a finished unit.

    Attributes:
        key: which unit of which job it is.
        sources: names with the numbers of the `source` column, in order.
        reasons: names with the numbers of the `reason` column, in order.
        words: white-space words of the rows that are kept.
        rows: lines or rows of its last file in this unit, if the next unit goes on with it.
    """

    key: str
    sources: dict[str, int] = {}
    reasons: dict[str, int] = {}
    words: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Job:
    """The text in units, and how each is processed.

    Attributes:
        options: all options of preprocess.py.
        source: the text.
        units: the plan of it.
        cleaning: what is normalized and rejected.
        folder: where unit files go.
        identity: digest of all that their content depends on, besides the tokenizer.
        tokenizer: what makes the ids; None: there are none.
    """

    options: PreprocessOptions
    source: Source
    units: Sequence[Unit]
    cleaning: Cleaning
    folder: Path
    identity: str
    tokenizer: Tokenizer | None

    @property
    def word_limit(self) -> int | None:
        """The most words of all documents; on the Hub the dataset size selects a config instead."""
        is_hub = self.options.source == ("hub",)
        return None if is_hub else word_limit(self.options.dataset_size)

    def path(self, unit: Unit) -> Path:
        """Returns the file of a finished unit."""
        return self.folder / f"{unit.number:06d}.unit"

    def key(self, unit: Unit) -> str:
        """Returns the key that identifies the file of a unit."""
        return digest(self.identity, self.tokenizer.sha256 if self.tokenizer else None, unit)

    def read(self, unit: Unit) -> Iterator[tuple[FilePart, Document]]:
        """Yields the rows of a unit from the source."""
        how = (self.options.text_column, self.options.on_bad_document)
        return read_parts(self.source, unit.parts, *how)

    def schema(self) -> pa.Schema:
        """Returns the columns of unit files."""
        names = band_names() if self.cleaning.near_duplicates else []
        bands = ((name, pa.uint64()) for name in names)
        replaced = ((kind, pa.int32()) for kind in self.cleaning.personal_data)
        return pa.schema([*SCHEMA, *bands, *replaced])


def digest(*content: Any) -> str:
    """Returns the SHA-256 of content as JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def list_file_parts(source: Source, number: int) -> list[FilePart]:
    """Returns the parts of a file; raises a UserError if it cannot be read."""
    return list_parts(source, UNIT_BYTES, [number])


def plan_units(source: Source, parts: Sequence[FilePart], first: int = 0) -> list[Unit]:
    """Returns the units of parts of a source, numbered from `first`.

    None has parts of a file on the Hub and of another file.
    """
    units: list[Unit] = []
    waiting: list[FilePart] = []
    num_bytes = 0
    for part in parts:
        is_other = waiting and part.file != waiting[-1].file
        is_alone = is_other and any(source.files[p.file].remote for p in (part, waiting[-1]))
        if waiting and (is_alone or num_bytes + part.num_bytes > UNIT_BYTES):
            units.append(Unit(first + len(units), tuple(waiting), num_bytes))
            waiting, num_bytes = [], 0
        waiting.append(part)
        num_bytes += part.num_bytes
    return [*units, Unit(first + len(units), tuple(waiting), num_bytes)]


def finish_unit(unit: Unit, job: Job, encoder: Encoder | None) -> UnitSummary:
    """Makes the file of a unit, unless it exists and is intact.

    Without an encoder there are no ids in it. Raises a UserError at bad input, an encoding that is
    not exact, or a disk that cannot be written.
    """
    with contextlib.suppress(UserError):
        return open_unit(unit, job)[1]
    rows_before, num_rows = rows_before_parts(job.source, unit.parts)
    summary = UnitSummary(job.key(unit), rows=num_rows)
    hashes = WordHashes()
    with sealed_file(job.path(unit)) as file, pa.ipc.new_stream(file, job.schema()) as writer:
        for rows in _batches(job.read(unit)):
            numbers = [rows_before[part] + document.number for part, document in rows]
            writer.write_batch(_build_batch(rows, numbers, job, encoder, hashes, summary))
        last = pa.RecordBatch.from_pylist([], schema=job.schema())
        writer.write_batch(last, custom_metadata={"summary": msgspec.json.encode(summary)})
    return summary


def open_unit(unit: Unit, job: Job) -> tuple[list[pa.RecordBatch], UnitSummary]:
    """As `read_unit`; raises a UserError if the file is missing, damaged or of another run."""
    path = job.path(unit)
    with contextlib.suppress(OSError, pa.ArrowException, msgspec.MsgspecError, KeyError, TypeError):
        if check_seal(path):
            batches, summary = read_unit(path)
            if summary.key == job.key(unit):
                return batches, summary
    what = "is missing, damaged or of another run"
    raise damaged(str(path), what, "Run the same command again: it makes this part again.")


def read_unit(path: Path) -> tuple[list[pa.RecordBatch], UnitSummary]:
    """Returns the batches of a unit file, memory-mapped, the last one empty, and its summary."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        batches, metadata = zip(*reader.iter_batches_with_custom_metadata(), strict=True)
    return list(batches), msgspec.json.decode(metadata[-1][b"summary"], type=UnitSummary)


def read_column(batches: list[pa.RecordBatch], name: str) -> np.ndarray:
    """Returns a whole column of numbers of a unit file, as a copy."""
    return np.concatenate([to_numpy(batch.column(name)) for batch in batches])


def read_rows(unit: Unit, batches: list[pa.RecordBatch], rows_before: int) -> np.ndarray:
    """Returns the lines or rows of a unit's file by their numbers in the files of the source.

    Args:
        unit, batches: the unit and what is in its file.
        rows_before: lines or rows of its first file in earlier units.
    """
    rows = read_column(batches, "row")
    rows[read_column(batches, "file") == unit.parts[0].file] += rows_before
    return rows


def _batches(rows: Iterator[tuple[FilePart, Document]]) -> Iterator[Rows]:
    """Yields rows in groups of bounded size."""
    batch: Rows = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += len(row[1].text) + _ROW_CHARACTERS
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _build_batch(
    rows: Rows,
    numbers: Sequence[int],
    job: Job,
    encoder: Encoder | None,
    hashes: WordHashes,
    summary: UnitSummary,
) -> pa.RecordBatch:
    """Cleans and encodes rows, of these numbers, and adds them to the summary."""
    # Clean: a reason says why a row is rejected.
    cleaned = job.cleaning.clean([document for _, document in rows], hashes)
    texts = ["" if document.reason else document.text for document in cleaned]
    # Count.
    sources, reasons = summary.sources, summary.reasons
    source = [sources.setdefault(document.source, len(sources)) for _, document in rows]
    reason = [reasons.setdefault(r, len(reasons)) if r else -1 for _, r, _ in cleaned]
    words = np.array([count_words(text) for text in texts], np.int64)
    summary.words += int(words.sum())
    # Encode.
    encoded = Encoded(np.empty(0, np.int32), np.zeros(len(rows), np.int64))
    if encoder is not None and job.tokenizer is not None:
        ids = encoder.encode(texts, lambda n: place(job.source, rows[n][0], rows[n][1].number))
        encoded = frame(ids, job.tokenizer.bos_id, job.tokenizer.eos_id)
    # Assemble the batch.
    offsets = np.concatenate([[0], np.cumsum(encoded.lengths)])
    columns = [
        pa.LargeListArray.from_arrays(from_numpy(offsets), from_numpy(encoded.ids)),
        from_numpy(np.array([split_position(text, job.options.seed) for text in texts], np.uint64)),
        from_numpy(words),
        from_numpy(np.array([len(text.encode()) for text in texts], np.int64)),
        from_numpy(np.array([part.file for part, _ in rows], np.int32)),
        from_numpy(np.array(numbers, np.int64)),
        from_numpy(np.array(source, np.int32)),
        from_numpy(np.array(reason, np.int32)),
    ]
    if job.cleaning.near_duplicates:
        columns += map(from_numpy, band_keys(texts, hashes).T)
    if job.cleaning.personal_data:
        num_replaced = np.array([document.num_replaced for document in cleaned], np.int32)
        columns += map(from_numpy, num_replaced.T)
    return pa.record_batch(columns, schema=job.schema())
