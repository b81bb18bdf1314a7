"""Cuts a document in two for the test split: a unit file of the parts of those that are cut.

The rest of the document is for training, its end for testing, each with its own <bos> and <eos>.
Both parts together are the document, character by character.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from kiem.core.errors import ExitCode, UserError, bad_input
from kiem.data.arrow import from_numpy
from kiem.data.prepare.fates import CUT, TEST, TRAIN, Fates
from kiem.data.prepare.packing import frame
from kiem.data.prepare.split import find_border, split_position
from kiem.data.prepare.unit_files import SCHEMA, UnitSummary, read_columns, write_unit
from kiem.data.prepare.units import Unit, UnitJob, read_unit_rows
from kiem.data.read.readers import place
from kiem.data.read.sources import count_words
from kiem.tokenizer.encoding import Encoder

_FILE = "cut.unit"


class CutDocuments(NamedTuple):
    """The parts of the documents that are cut: of one text, or of several that are equal.

    Attributes:
        path: a unit file with two rows for each of them.
        fate: TRAIN or TEST, int8 [rows].
        entry: what the manifest says of it.
    """

    path: Path
    fate: np.ndarray
    entry: dict[str, Any]


def cut_documents(
    units: Sequence[Unit], job: UnitJob, fates: Fates, encoder: Encoder
) -> CutDocuments:
    """Cuts the documents that are to be cut; the text is read from the source again.

    Args:
        units: the plan.
        job: where the finished units are, and how the source is read.
        fates: what becomes of every row.
        encoder: makes ids of the parts.

    Raises:
        UserError: the text is one character, the source changed meanwhile, or the disk cannot be
            written.
    """
    assert fates.split.cut_bytes is not None
    text, where = _read_first(units, job, fates)
    border = find_border(text, fates.split.cut_bytes)
    if border is None:
        raise UserError(
            "too little text to train and to test on",
            where=where,
            fix="Use more text.",
            exit_code=ExitCode.DATASET_TOO_SMALL,
        )
    texts = [text[: border.place], text[border.place :]]
    framed = frame(encoder.encode(texts, lambda _: where), job.bos_id, job.eos_id)
    num_bytes = [len(part.encode()) for part in texts]
    labels = _labels(units, job, fates)
    names, numbers = np.unique(labels, return_inverse=True)
    num_copies, num_rows = len(labels), 2 * len(labels)
    ends = np.cumsum(np.tile(framed.lengths, num_copies))
    columns = [
        pa.LargeListArray.from_arrays(
            from_numpy(np.concatenate([np.zeros(1, np.int64), ends])),
            from_numpy(np.tile(framed.ids, num_copies)),
        ),
        from_numpy(np.full(num_rows, fates.split.limit, np.uint64)),
        from_numpy(np.tile([count_words(part) for part in texts], num_copies)),
        from_numpy(np.tile(num_bytes, num_copies)),
        from_numpy(np.repeat(numbers, 2).astype(np.int32)),
        from_numpy(np.full(num_rows, -1, np.int32)),
    ]
    path = job.folder / _FILE
    summary = UnitSummary("", [], names.tolist(), [], 0, 0, 0, 0, {})
    write_unit(path, [pa.record_batch(columns, schema=SCHEMA)], summary)
    entry = {
        "documents": num_copies,
        "at": where,
        "border": border.kind,
        "train_bytes": num_bytes[0],
        "test_bytes": num_bytes[1],
    }
    return CutDocuments(path, np.tile(np.array([TRAIN, TEST], np.int8), num_copies), entry)


def _labels(units: Sequence[Unit], job: UnitJob, fates: Fates) -> list[str]:
    """Returns the source of every document that is cut."""
    labels: list[str] = []
    for unit, fate in zip(units, fates.per_unit, strict=False):
        if (fate == CUT).any():
            columns, summary = read_columns(job.path(unit), ("source",))
            labels += [summary.sources[number] for number in columns["source"][fate == CUT]]
    return labels


def _read_first(units: Sequence[Unit], job: UnitJob, fates: Fates) -> tuple[str, str]:
    """Returns the text of the first document that is cut, normalized, and its place."""
    pairs = zip(units, fates.per_unit, strict=False)
    unit, fate = next(pair for pair in pairs if (pair[1] == CUT).any())
    wanted, source = int(np.argmax(fate == CUT)), job.reading.source
    for number, (part, row) in enumerate(read_unit_rows(unit, job.reading)):
        if number == wanted:
            text = job.cleaning.normalize(row.text)
            if split_position(text, job.seed) == fates.split.limit:
                return text, place(source, part, row.number)
    raise bad_input(
        str(job.reading.source.name),
        "the text changed while it was read",
        "Run it again when nothing writes to the files any more.",
    )
