"""Second readings of the source, for the few documents whose text is needed after the decisions.

These are the training documents for a new vocabulary, documents that are cut for the test split,
and rejected documents. They come in the order of the plan, so any workers give the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import new_file, sha256_file
from kiem.data.chunks import REJECTED_FILE
from kiem.data.prepare.decisions import REJECTED, DocumentDecisions
from kiem.data.prepare.downloads import fetch
from kiem.data.prepare.packing import frame
from kiem.data.prepare.split import CUT, TEST, TRAIN, find_border
from kiem.data.prepare.units import Job, read_rows, read_unit
from kiem.data.prepare.write_splits import UnitDocuments
from kiem.data.read.readers import FilePart
from kiem.data.read.rows import Document
from kiem.data.read.sources import count_words
from kiem.tokenizer.encoding import Encoder, fast_path


def read_again(
    job: Job, decisions: DocumentDecisions, wanted: Sequence[int]
) -> Iterator[tuple[int, FilePart, Document]]:
    """Reads the rows with one of the `wanted` decisions again.

    Yields the decision with each, and documents with their numbers in the file.
    """
    file = -1
    for unit, codes, rows_before in decisions.by_unit():
        is_wanted = np.isin(codes, wanted)
        if not is_wanted.any():
            continue
        if unit.parts[0].file != file:
            # All that is on the Hub of a unit is one file.
            file = unit.parts[0].file
            job = fetch(job, [file])
        rows = read_rows(unit, read_unit(job.path(unit))[0], rows_before).tolist()
        for number, (part, document) in enumerate(job.read(unit)):
            # A changed file may have more rows; the reader raises at the end of the part.
            if number < len(codes) and is_wanted[number]:
                yield int(codes[number]), part, document._replace(number=rows[number])


@dataclass(frozen=True)
class TrainingTexts:
    """The texts of the training documents, read each time that they are iterated over."""

    job: Job
    decisions: DocumentDecisions

    def __iter__(self) -> Iterator[str]:
        cut_bytes = self.decisions.split.cut_bytes
        for code, _, document in read_again(self.job, self.decisions, (TRAIN, CUT)):
            text = self.job.cleaning.final_text(document.text)
            if code == TRAIN:
                yield text
            elif cut_bytes and (border := find_border(text, cut_bytes)) is not None:
                yield text[: border.place]


def cut_documents(job: Job, decisions: DocumentDecisions) -> tuple[UnitDocuments, dict[str, Any]]:
    """Cuts the document that is to be cut, and documents equal to it.

    Returns:
        Two rows for each copy, for training and for testing, each with its own <bos> and <eos>; and
        the manifest's entry about them.
    """
    assert job.tokenizer is not None
    assert decisions.split.cut_bytes is not None
    labels: list[str] = []
    files: list[int] = []
    rows: list[int] = []
    for _, part, document in read_again(job, decisions, (CUT,)):
        if not labels:
            text = job.cleaning.final_text(document.text)
        labels.append(document.source)
        files.append(part.file)
        rows.append(document.number)
    names = [job.source.files[file].name for file in files]
    places = [f"{name}:{row}" for name, row in zip(names, rows, strict=True)]
    border = find_border(text, decisions.split.cut_bytes)
    if border is None:
        raise UserError(
            "too little text to train and to test on",
            where=places[0],
            fix="Use more text.",
            exit_code=ExitCode.DATASET_TOO_SMALL,
        )
    texts = [text[: border.place], text[border.place :]]
    encoder = Encoder(job.tokenizer, fast_path(job.tokenizer, job.options.encoder))
    encoded = encoder.encode(texts, lambda _: places[0])
    encoded = frame(encoded, job.tokenizer.bos_id, job.tokenizer.eos_id)
    ids = np.split(encoded.ids, encoded.lengths[:1])
    num_bytes = [len(text.encode()) for text in texts]
    num_words = [count_words(text) for text in texts]
    sources = sorted(set(labels))
    columns = {
        "ids": pa.array(ids * len(labels), pa.large_list(pa.int32())),
        "words": pa.array(num_words * len(labels), pa.int64()),
        "bytes": pa.array(num_bytes * len(labels), pa.int64()),
        "source": pa.array([sources.index(n) for n in labels for _ in texts], pa.int32()),
        "file": pa.array(np.repeat(files, len(texts)), pa.int32()),
    }
    entry = {
        "documents": len(labels),
        "places": places,
        "border": border.kind,
        "train_bytes": num_bytes[0],
        "test_bytes": num_bytes[1],
    }
    codes = np.tile(np.array([TRAIN, TEST], np.int16), len(labels))
    batches = [pa.record_batch(columns)]
    return UnitDocuments(batches, sources, codes, np.repeat(rows, len(texts))), entry


def write_rejected(job: Job, decisions: DocumentDecisions, folder: Path) -> dict[str, Any]:
    """Writes the rejected documents as they were read, but for personal data that is replaced.

    Returns:
        The manifest's entry about them.
    """
    path = folder / REJECTED_FILE
    wanted = range(REJECTED, REJECTED + len(decisions.reasons))
    num_lines = 0
    with new_file(path) as file:
        for code, part, document in read_again(job, decisions, wanted):
            name = job.source.files[part.file].name
            line = {
                "place": f"{name}:{document.number}",
                "source": document.source,
                "reason": decisions.reasons[code - REJECTED],
                "text": job.cleaning.hide_personal_data(document.text)[0] or None,
            }
            file.write(msgspec.json.encode(line) + b"\n")
            num_lines += 1
    assert num_lines == sum(decisions.counts["rejected"].values()), "rejected documents were lost"
    return {"lines": num_lines, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
