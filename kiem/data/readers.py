"""Reading the documents of one piece of a file: a byte range, a row group, or the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from kiem.data.json_lines import read_gzip, read_json_lines, read_lines
from kiem.data.parquet import read_row_group, row_groups
from kiem.data.rows import (
    BOM,
    MAX_DOCUMENT_BYTES,
    NOT_UTF8,
    TOO_LONG,
    Row,
    bad_input,
    checked_row,
    reading_errors,
)
from kiem.data.sources import Source, file_stamp


class Piece(NamedTuple):
    """A part of a file that can be read by itself.

    Attributes:
        file: number of the file in its source.
        start: first byte (JSON Lines), row group (Parquet) or 0.
        stop: one past the last. A line belongs to the piece that its first byte is in.
        num_bytes: about how much of the file it is, for progress.
    """

    file: int
    start: int
    stop: int
    num_bytes: int


def cut_source(source: Source, piece_bytes: int) -> list[Piece]:
    """Returns the pieces of all files, in order, of some `piece_bytes` where the type can be cut.

    Raises:
        UserError: a file is empty, gone, or a damaged Parquet file.
    """
    files = enumerate(zip(source.paths, source.names, strict=True))
    return [piece for n, (path, name) in files for piece in _cut_file(path, name, n, piece_bytes)]


def _cut_file(path: Path, name: str, file: int, piece_bytes: int) -> list[Piece]:
    with reading_errors(name):
        size = path.stat().st_size
        if path.suffix == ".txt":
            return [Piece(file, 0, size, size)]
        if size == 0:
            raise bad_input(name, "the file is empty", "Remove it from --source.")
        if path.suffix == ".parquet":
            groups = enumerate(row_groups(path, name))
            return [Piece(file, n, n + 1, num_bytes) for n, (_, num_bytes) in groups]
        if path.suffix == ".gz":
            return [Piece(file, 0, size, size)]
        starts = range(0, size, piece_bytes)
        stops = [min(start + piece_bytes, size) for start in starts]
        return [Piece(file, a, b, b - a) for a, b in zip(starts, stops, strict=True)]


def read_rows(
    source: Source, pieces: Iterable[Piece], text_column: str, on_bad: Literal["stop", "skip"]
) -> Iterator[tuple[Piece, Row]]:
    """Yields every row of some pieces, with the piece it is in.

    Args:
        source: where the files are.
        pieces: which parts of them.
        text_column: the column or key that holds the text.
        on_bad: what to do at a row that is no document: stop, or yield it with its problem.

    Raises:
        UserError: a damaged file, one that changed since `source` was made, or `on_bad` says so;
            names file and line.
    """
    for piece in pieces:
        path, name = source.paths[piece.file], source.names[piece.file]
        with reading_errors(name):
            for row in _read_piece(path, name, piece, text_column):
                if row.problem is not None and on_bad == "stop":
                    raise row.problem.error(place(path, name, piece, row.number))
                yield piece, row
            if file_stamp(path) != source.stamps[piece.file]:
                fix = "Run it again when nothing writes to the file any more."
                raise bad_input(name, "the file changed while it was read", fix)


def _read_piece(path: Path, name: str, piece: Piece, text_column: str) -> Iterator[Row]:
    """Yields every row of a piece, whether it is a document or not."""
    if path.suffix == ".txt":
        yield _text_file(path, name)
    elif path.suffix == ".parquet":
        yield from read_row_group(path, piece.start, name, text_column)
    elif path.suffix == ".gz":
        yield from read_gzip(path, name, text_column)
    else:
        yield from read_json_lines(path, piece.start, piece.stop, name, text_column)


def place(path: Path, name: str, piece: Piece, number: int) -> str:
    """Returns `file:line` of a row of a piece; counts the lines or rows before the piece."""
    return f"{name}:{count_rows(path, name, 0, piece.start) + number}"


def count_rows(path: Path, name: str, start: int, stop: int) -> int:
    """Returns how many lines begin in a byte range of a file, or the rows of row groups."""
    if start == stop:
        return 0
    with reading_errors(name):
        if path.suffix == ".parquet":
            return sum(num_rows for num_rows, _ in row_groups(path, name)[start:stop])
        return sum(1 for _ in read_lines(path, start, stop))


def _text_file(path: Path, name: str) -> Row:
    source = Path(name).name
    with path.open("rb") as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        return Row(None, source, 1, TOO_LONG)
    try:
        return checked_row(data.removeprefix(BOM).decode(), source, 1)
    except UnicodeDecodeError as error:
        return Row(None, source, error.object.count(b"\n", 0, error.start) + 1, NOT_UTF8)
