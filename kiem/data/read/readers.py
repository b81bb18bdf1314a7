"""Reading the documents of one part of a file: a byte range, a row group, or the whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from kiem.core.errors import ExitCode, UserError, no_effect
from kiem.data.read.arrow_files import read_arrow
from kiem.data.read.formats import DECOMPRESSION_ERRORS, decompression_error, open_content
from kiem.data.read.json_lines import read_json_lines
from kiem.data.read.json_values import read_json
from kiem.data.read.lines import read_lines
from kiem.data.read.parquet import read_row_group, row_groups
from kiem.data.read.rows import Document, bad_input, reading_errors
from kiem.data.read.sources import Source, file_stamp
from kiem.data.read.standard_input import STANDARD_INPUT
from kiem.data.read.tables import read_table
from kiem.data.read.text_files import (
    BLANK_LINES,
    EVERY_LINE,
    read_separated_text,
    read_whole_text,
    read_wikiextractor,
    separator_test,
)


class FilePart(NamedTuple):
    """A part of a file that can be read by itself.

    Attributes:
        file: number of the file in its source.
        start: first byte (lines), row group (Parquet) or 0.
        stop: one past the last. A line belongs to the part that its first byte is in.
        num_bytes: about how much of the file it is, for progress.
    """

    file: int
    start: int
    stop: int
    num_bytes: int


def list_parts(source: Source, part_bytes: int) -> list[FilePart]:
    """Returns the parts of all files, in order, of some `part_bytes` where the type can be cut.

    Raises:
        UserError: a file is empty, gone, or a damaged Parquet file.
    """
    return [
        part
        for file, name in enumerate(source.names)
        for part in _cut_file(source, file, name, part_bytes)
    ]


def _cut_file(source: Source, file: int, name: str, part_bytes: int) -> list[FilePart]:
    path, (kind, compression) = source.paths[file], source.formats[file]
    with reading_errors(name):
        size = path.stat().st_size
        whole = [FilePart(file, 0, size, size)]
        if kind == "text" and (source.document_separator is None or compression or size == 0):
            return whole
        if size == 0:
            raise bad_input(name, "the file is empty", "Remove it.")
        if kind == "parquet":
            groups = enumerate(row_groups(path, name))
            return [FilePart(file, n, n + 1, num_bytes) for n, (_, num_bytes) in groups]
        if kind not in ("text", "json lines") or compression:
            return whole
        starts = range(0, size, part_bytes)
        stops = [min(start + part_bytes, size) for start in starts]
        return [FilePart(file, a, b, b - a) for a, b in zip(starts, stops, strict=True)]


def check_effects(source: Source, text_column: str) -> None:
    """Raises a UserError if there are no columns to choose from, or nothing is separated."""
    kinds = {kind for kind, _ in source.formats}
    if text_column != "text" and kinds <= {"text", "wikiextractor"}:
        raise no_effect("--text-column", "on this source, which has no columns")
    separator = source.document_separator
    if separator is None:
        return
    files = [n for n, (kind, _) in enumerate(source.formats) if kind == "text"]
    if not files:
        raise no_effect("--document-separator", "on this source, which has no files of text")
    if separator == EVERY_LINE or any(_has_separator(source, n, separator) for n in files):
        return
    raise UserError(
        "has no effect: no file of text has such a line",
        where=f"--document-separator {separator}",
        fix=f"Give the text of a whole line, {BLANK_LINES} or {EVERY_LINE}, or leave it out.",
        exit_code=ExitCode.NO_EFFECT,
    )


def read_parts(
    source: Source, parts: Iterable[FilePart], text_column: str, on_bad: Literal["stop", "skip"]
) -> Iterator[tuple[FilePart, Document]]:
    """Yields every row of some parts, with the part it is in.

    Args:
        source: where the files are.
        parts: which parts of them.
        text_column: the column or key that holds the text.
        on_bad: what to do at a row that is no document: stop, or yield it with its problem.

    Raises:
        UserError: a damaged file, one that changed since `source` was made, or `on_bad` says so;
            names file and line.
    """
    for part in parts:
        path, name = source.paths[part.file], source.names[part.file]
        with reading_errors(name):
            for row in _read_part(source, part, text_column):
                if row.problem is not None and on_bad == "stop":
                    raise row.problem.error(place(source, part, row.number))
                yield part, row
            if file_stamp(path) != source.stamps[part.file]:
                fix = "Run it again when nothing writes to the file any more."
                raise bad_input(name, "the file changed while it was read", fix)


def read_documents(source: Source, text_column: str, fix: str) -> Iterator[Document]:
    """Returns the documents of a source, all of which must be good.

    What can be checked without reading them is checked at once.

    Args:
        source: where the files are.
        text_column: the column or key that holds the text.
        fix: what to do about a row that is no document.

    Raises:
        UserError: as `read_parts`.
    """
    parts = list_parts(source, sys.maxsize)

    def documents() -> Iterator[Document]:
        for part, row in read_parts(source, parts, text_column, "skip"):
            if row.problem is not None:
                raise bad_input(place(source, part, row.number), row.problem.what, fix)
            yield row

    return documents()


def place(source: Source, part: FilePart, number: int) -> str:
    """Returns `file:line` of a row of a part; counts the lines or rows before the part."""
    num_before = count_rows(source, part.file, 0, part.start)
    return f"{source.names[part.file]}:{num_before + number}"


def count_rows(source: Source, file: int, start: int, stop: int) -> int:
    """Returns how many lines begin in a byte range of a file, or the rows of row groups."""
    if start == stop:
        return 0
    path, name = source.paths[file], source.names[file]
    with reading_errors(name):
        if source.formats[file].kind == "parquet":
            return sum(num_rows for num_rows, _ in row_groups(path, name)[start:stop])
        with path.open("rb") as content:
            return sum(1 for _ in read_lines(content, start, stop))


def _read_part(source: Source, part: FilePart, text_column: str) -> Iterator[Document]:
    """Yields every row of a part, whether it is a document or not."""
    path, name = source.paths[part.file], source.names[part.file]
    kind, compression = source.formats[part.file]
    label = _label(name)
    if kind == "parquet":
        yield from read_row_group(path, part.start, name, text_column, label)
        return
    if kind == "arrow":
        yield from read_arrow(path, name, text_column, label)
        return
    number = 0
    try:
        with open_content(path, compression) as file:
            for row in _read_content(file, source, part, text_column):
                number = row.number
                yield row
    except DECOMPRESSION_ERRORS as error:
        raise decompression_error(f"{name}:{number + 1}", compression, error) from error


def _read_content(
    file: BinaryIO, source: Source, part: FilePart, text_column: str
) -> Iterator[Document]:
    """Yields the rows of a part of a file that is read as bytes, from its decompressed content."""
    name, (kind, compression) = source.names[part.file], source.formats[part.file]
    start, stop = part.start, sys.maxsize if compression else part.stop
    label = _label(name)
    separator = source.document_separator
    if kind == "text" and separator is None:
        yield read_whole_text(file, stop, label if name == STANDARD_INPUT else Path(name).name)
    elif kind == "text" and separator is not None:
        yield from read_separated_text(file, start, stop, separator, label)
    elif kind == "json lines":
        yield from read_json_lines(read_lines(file, start, stop), text_column, label)
    elif kind == "json":
        yield from read_json(file, name, text_column, label)
    elif kind == "csv" or kind == "tsv":
        yield from read_table(file, kind, name, text_column, label)
    else:
        assert kind == "wikiextractor", kind
        yield from read_wikiextractor(read_lines(file, start, stop), label)


def _label(name: str) -> str:
    """Returns what the rows of a file are counted under that do not say it themselves."""
    return "stdin" if name == STANDARD_INPUT else Path(name).name.split(".")[0]


def _has_separator(source: Source, file: int, separator: str) -> bool:
    name, compression = source.names[file], source.formats[file].compression
    try:
        with reading_errors(name), open_content(source.paths[file], compression) as content:
            return any(map(separator_test(separator), read_lines(content, 0, sys.maxsize)))
    except DECOMPRESSION_ERRORS as error:
        raise decompression_error(name, compression, error) from error
