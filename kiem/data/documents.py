"""Which document every token of a chunk directory is of: documents/train.arrow and test.arrow.

A row is a piece of a document, or padding, in the order of the chunks. It ends where the next one
begins. Packed with concat, each document is one piece; best-fit cuts some into several.

position   int64   the piece's first token, counted over all chunks of the split
start      int32   the same token, counted in its document, which begins with <bos>
file       int32   number of the file in the manifest's `documents_per_file`; NO_SOURCE: padding
row        int64   line or row of the file, from 1
source     int32   number of the source in the split's `source_names`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from kiem.core.errors import ExitCode, UserError, damaged
from kiem.core.files import sha256_file
from kiem.core.manifest import verify_file
from kiem.data.arrow import from_numpy, to_numpy
from kiem.data.chunks import MAKE_AGAIN, NO_SOURCE

DOCUMENTS = "documents"
_BATCH_ROWS = 1 << 16
# Not compressed: so the bytes depend on no library's version, and a piece is found without reading
# the others.
_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("start", pa.int32()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("source", pa.int32()),
    ]
)
_DTYPE = np.dtype([(field.name, field.type.to_pandas_dtype()) for field in _SCHEMA])


class Piece(NamedTuple):
    """Tokens of a chunk that are of one document.

    Attributes:
        chunk: the chunk's number.
        offset, length: which tokens of the chunk.
        start: the first one's number in the document, whose number 0 is <bos>.
        file: number of the document's file.
        row: its line or row in the file, from 1.
        source: number of its source in the split's `source_names`.
    """

    chunk: int
    offset: int
    length: int
    start: int
    file: int
    row: int
    source: int


class DocumentWriter:
    """Writes the pieces of one split.

    Args:
        path: of the file, in the unfinished chunk directory.
        open_files: closes it.
    """

    def __init__(self, path: Path, open_files: ExitStack):
        path.parent.mkdir(exist_ok=True)
        self._path = path
        file = open_files.enter_context(pa.OSFile(str(path), "wb"))
        self._writer = pa.ipc.new_stream(file, _SCHEMA)
        self._waiting = np.empty(0, _DTYPE)
        self._num_rows = 0

    def write(self, pieces: np.ndarray) -> None:
        """Appends pieces, a structured array with the columns of the file."""
        self._waiting = np.concatenate([self._waiting, pieces])
        # Batches of one size, so that the file does not depend on how the pieces arrive.
        while len(self._waiting) >= _BATCH_ROWS:
            self._write_batch(self._waiting[:_BATCH_ROWS])
            self._waiting = self._waiting[_BATCH_ROWS:]

    def close(self) -> dict[str, Any]:
        """Finishes the file and returns the manifest's entry of it."""
        self._write_batch(self._waiting)
        self._writer.close()
        return {
            "file": f"{self._path.parent.name}/{self._path.name}",
            "pieces": self._num_rows,
            "bytes": self._path.stat().st_size,
            "sha256": sha256_file(self._path),
        }

    def _write_batch(self, pieces: np.ndarray) -> None:
        columns = [from_numpy(pieces[name]) for name in _SCHEMA.names]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._num_rows += len(pieces)


def make_pieces(**columns: Any) -> np.ndarray:
    """Returns pieces from arrays of their columns, or from numbers that are the same for all."""
    pieces = np.empty(len(columns["position"]), _DTYPE)
    for name, values in columns.items():
        pieces[name] = values
    return pieces


@dataclass(frozen=True)
class Documents:
    """The pieces of a split, memory-mapped; see `Piece`.

    Attributes:
        columns: for each batch of the file its columns.
        positions: of the first piece of each batch.
        chunk_size, num_chunks: of the split.
    """

    columns: list[dict[str, np.ndarray]]
    positions: np.ndarray
    chunk_size: int
    num_chunks: int

    def in_chunk(self, number: int) -> Iterator[Piece]:
        """Yields the pieces of a chunk in order, without padding."""
        first, end = number * self.chunk_size, (number + 1) * self.chunk_size
        batch = int(np.searchsorted(self.positions, first, side="right")) - 1
        place = int(np.searchsorted(self.columns[batch]["position"], first, side="right")) - 1
        begin = first
        while begin < end:
            columns = self.columns[batch]
            start = int(columns["start"][place]) + begin - int(columns["position"][place])
            file, row, source = (int(columns[name][place]) for name in ("file", "row", "source"))
            place += 1
            if place == len(columns["position"]):
                batch, place = batch + 1, 0
            is_last = batch == len(self.columns)
            following = end if is_last else int(self.columns[batch]["position"][place])
            length = min(following, end) - begin
            if file != NO_SOURCE:
                yield Piece(number, begin - first, length, start, file, row, source)
            begin += length


def open_verified_documents(path: Path, manifest: dict[str, Any], split: str) -> Documents:
    """As `open_documents`, and checks the file's hash."""
    for entry in manifest["splits"][split].get("document_shards", ()):
        verify_file(path / entry["file"], entry["sha256"], entry["bytes"], fix=MAKE_AGAIN)
    return open_documents(path, manifest, split)


def open_documents(path: Path, manifest: dict[str, Any], split: str) -> Documents:
    """Maps the pieces of a split into memory.

    Raises:
        UserError: the chunk directory has none, since an earlier version made it; or the file is
            missing or damaged.
    """
    counts = manifest["splits"][split]
    if not counts.get("document_shards"):
        raise UserError(
            "this chunk directory does not record its documents: an earlier version made it",
            where=str(path),
            fix="Make it again beside this one, with preprocess.py and another --name: the same "
            "text and options give the same chunks. kiem audit --dataset-path takes it instead.",
            exit_code=ExitCode.NOT_FOUND,
        )
    [entry] = counts["document_shards"]
    file = path / entry["file"]
    try:
        with pa.memory_map(str(file)) as mapped:
            batches = pa.ipc.open_stream(mapped).read_all().to_batches()
        num_pieces = sum(batch.num_rows for batch in batches)
        if any(batch.schema != _SCHEMA for batch in batches) or num_pieces != entry["pieces"]:
            raise ValueError(f"it does not have {entry['pieces']} pieces")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(str(file), f"cannot be read ({error})", MAKE_AGAIN) from error
    columns = [
        {name: to_numpy(batch.column(name)) for name in _SCHEMA.names}
        for batch in batches
        if batch.num_rows
    ]
    positions = np.array([batch["position"][0] for batch in columns], np.int64)
    return Documents(columns, positions, manifest["options"]["chunk_size"], counts["chunks"])
