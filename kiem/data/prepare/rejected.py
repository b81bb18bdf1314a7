"""The file of rejected documents, each with its place and the reason.

They are read from the source again, in the order of the plan, so that nothing of them has to be
kept meanwhile and the file is the same whatever worker made which unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kiem.core.files import new_file, sha256_file
from kiem.data.chunks import REJECTED_FILE
from kiem.data.prepare.fates import Fates, rejection_reasons
from kiem.data.prepare.units import Unit, UnitJob, read_unit_rows
from kiem.data.read.readers import FilePart, count_rows
from kiem.data.read.sources import Source


class RejectedDocument(msgspec.Struct):
    """A line of the file.

    Attributes:
        place: `file:line`, as in messages.
        source: which source it is counted under.
        reason: as it is counted in the manifest.
        text: as it was read, before mending; None when the row is not a document.
    """

    place: str
    source: str
    reason: str
    text: str | None


def write_rejected(
    units: Sequence[Unit], job: UnitJob, fates: Fates, folder: Path
) -> dict[str, Any]:
    """Writes the rejected documents up to the word limit.

    Args:
        units: the plan.
        job: where the finished units are, and how the source is read.
        fates: what becomes of every row.
        folder: the unfinished chunk directory.

    Returns:
        The manifest's entry of the file.

    Raises:
        UserError: the source changed meanwhile, or the file cannot be written.
    """
    path = folder / REJECTED_FILE
    num_lines = 0
    encode = msgspec.json.Encoder().encode
    with new_file(path) as file:
        for document in _rejected_documents(units, job, fates):
            file.write(encode(document) + b"\n")
            num_lines += 1
    assert num_lines == fates.rejected.total(), "rejected documents were lost"
    return {"lines": num_lines, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _rejected_documents(
    units: Sequence[Unit], job: UnitJob, fates: Fates
) -> Iterator[RejectedDocument]:
    places = _Places(job.reading.source)
    for unit, fate in zip(units, fates.per_unit, strict=False):
        which, reasons = rejection_reasons(job.path(unit), fate)
        if (which < 0).all():
            continue
        num_rows = 0
        for part, row in read_unit_rows(unit, job.reading):
            # A file that changed may have more rows; the reader refuses it at the end of the part.
            if num_rows < len(which) and which[num_rows] >= 0:
                reason = reasons[which[num_rows]]
                place = places.of(part, row.number)
                yield RejectedDocument(place, row.source, reason, row.text or None)
            num_rows += 1
        assert num_rows == len(which), f"{num_rows} rows, not {len(which)}"


class _Places:
    """Says where rows are; reads each file once to count, as long as they come in order."""

    def __init__(self, source: Source):
        self._source = source
        self._file = self._start = self._num_before = 0

    def of(self, part: FilePart, number: int) -> str:
        """Returns `file:line` of a row of a part."""
        if part.file != self._file:
            self._file, self._start, self._num_before = part.file, 0, 0
        self._num_before += count_rows(self._source, part.file, self._start, part.start)
        self._start = part.start
        return f"{self._source.names[part.file]}:{self._num_before + number}"
