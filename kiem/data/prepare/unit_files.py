"""Unit files: one for every finished unit, with a row for every row of the source.

    ids       large_list<int32>   <bos> text <eos>; empty for a rejected row
    position  uint64              place in the split
    words, bytes, source, reason (-1: kept)
    band_0 ... uint64             keys of near duplicates, when asked for

The checksum of all that is at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import read_sealed, sealed_file
from kiem.data.arrow import to_numpy
from kiem.data.read.section import reading_errors

SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.int32())),
        ("position", pa.uint64()),
        ("words", pa.int64()),
        ("bytes", pa.int64()),
        ("source", pa.int32()),
        ("reason", pa.int32()),
    ]
)


class UnitSummary(msgspec.Struct):
    """What a unit file says of itself.

    Attributes:
        key: which unit it is, and of what.
        rows: of each part of a file in the unit, kept or not.
        sources: the names that the `source` column counts.
        reasons: the reasons that the `reason` column counts.
        documents: rows that were kept.
        words: white-space words of those.
        bytes: UTF-8 bytes of those.
        tokens: their tokens, control tokens included.
        seconds: processor time per stage.
    """

    key: str
    rows: list[int]
    sources: list[str]
    reasons: list[str]
    documents: int
    words: int
    bytes: int
    tokens: int
    seconds: dict[str, float]


def find_damage(path: Path) -> str | None:
    """Returns what is wrong with a file, to be put behind its name; None if it is sound."""
    with reading_errors(str(path)):
        if not path.is_file():
            return "is missing"
        return None if read_sealed(path) is not None else "is damaged (its sha256 differs)"


def bad_unit(path: Path, fault: str) -> UserError:
    """Returns the error that a unit file cannot be used."""
    return UserError(
        fault,
        where=str(path),
        fix="Run the same command again: this part is made anew.",
        exit_code=ExitCode.DAMAGED,
    )


def write_unit(
    path: Path, batches: Iterable[pa.RecordBatch], summary: UnitSummary, schema: pa.Schema = SCHEMA
) -> None:
    """Writes a unit file; `summary` is looked at after the last batch."""
    with sealed_file(path) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
        metadata = {"summary": msgspec.json.encode(summary)}
        last = pa.RecordBatch.from_pylist([], schema=schema)
        writer.write_batch(last, custom_metadata=metadata)


def read_unit(path: Path) -> tuple[list[pa.RecordBatch], UnitSummary]:
    """Returns the batches of a unit file, memory-mapped, the last one empty, and its summary."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        batches, metadata = zip(*reader.iter_batches_with_custom_metadata(), strict=True)
    return list(batches), msgspec.json.decode(metadata[-1][b"summary"], type=UnitSummary)


def open_unit(path: Path) -> tuple[list[pa.RecordBatch], UnitSummary]:
    """As `read_unit`, of a file that may have changed since it was written.

    Raises:
        UserError: the file is missing or damaged.
    """
    if (fault := find_damage(path)) is not None:
        raise bad_unit(path, fault)
    return read_unit(path)


def read_columns(path: Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], UnitSummary]:
    """Returns whole columns of a unit file, as copies, and its summary."""
    batches, summary = read_unit(path)
    columns = {
        name: np.concatenate([to_numpy(batch.column(name)) for batch in batches]) for name in names
    }
    return columns, summary
