"""The documents and records of a source, read in parts that do not depend on each other."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kiem.core.errors import ExitCode, UserError, bad_input, no_effect
from kiem.data.read.columnar import row_groups
from kiem.data.read.find_files import STANDARD_INPUT
from kiem.data.read.formats import READERS, WITH_COLUMNS, WITHOUT_COLUMNS
from kiem.data.read.rows import NOT_OBJECT, Document, Problem, Row, document_in
from kiem.data.read.section import Section, decompression_errors, reading_errors
from kiem.data.read.sources import Source, file_stamp
from kiem.data.read.text_files import BLANK_LINES, EVERY_LINE, separator_test


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
        part for file in range(len(source.paths)) for part in _file_parts(source, file, part_bytes)
    ]


def _file_parts(source: Source, file: int, part_bytes: int) -> list[FilePart]:
    path, name, (kind, compression) = source.paths[file], source.names[file], source.formats[file]
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


def read_parts(
    source: Source, parts: Iterable[FilePart], text_column: str, on_bad: Literal["stop", "skip"]
) -> Iterator[tuple[FilePart, Document]]:
    """Yields the document in every row of some parts, with the part it is in.

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
        label = _default_label(source, part.file)
        for row in _read_rows(source, part, text_column):
            document = document_in(row, text_column, label)
            if document.problem is not None and on_bad == "stop":
                raise document.problem.error(place(source, part, document.number))
            yield part, document


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
        for part, document in read_parts(source, parts, text_column, "skip"):
            if document.problem is not None:
                raise document.problem.error(place(source, part, document.number), fix)
            yield document

    return documents()


def read_records(source: Source, fix: str) -> Iterator[tuple[FilePart, int, dict[str, Any]]]:
    """Yields the rows of a source: part of a file, number in it and the values by column.

    Args:
        source: where the files are.
        fix: what to do about a row that is no record.

    Raises:
        UserError: a file is damaged or has no columns, or a row is no record; names it.
    """
    for name, (kind, _) in zip(source.names, source.formats, strict=True):
        if kind in WITHOUT_COLUMNS:
            raise bad_input(name, "has no columns", f"Give a file with columns: {WITH_COLUMNS}.")
    for part in list_parts(source, sys.maxsize):
        for number, value in _read_rows(source, part, column=None):
            if not isinstance(value, dict):
                problem = value if isinstance(value, Problem) else NOT_OBJECT
                raise problem.error(place(source, part, number), fix)
            yield part, number, value


def place(source: Source, part: FilePart, number: int) -> str:
    """Returns `file:line` of a row of a part; counts the lines or rows before the part."""
    num_before = count_rows(source, part.file, 0, part.start)
    return f"{source.names[part.file]}:{num_before + number}"


def count_rows(source: Source, file: int, start: int, stop: int) -> int:
    """Returns how many lines begin in a byte range of a file, or the rows of row groups."""
    if start == stop:
        return 0
    with reading_errors(source.names[file]):
        if source.formats[file].kind == "parquet":
            groups = row_groups(source.paths[file], source.names[file])
            return sum(num_rows for num_rows, _ in groups[start:stop])
        return sum(1 for _ in _section(source, FilePart(file, start, stop, 0)).lines())


def check_effects(source: Source, text_column: str) -> None:
    """Raises a UserError if there are no columns to choose from, or nothing is separated."""
    kinds = [kind for kind, _ in source.formats]
    if text_column != "text" and not set(kinds).difference(WITHOUT_COLUMNS):
        raise no_effect("--text-column", "on this source, which has no columns")
    separator = source.document_separator
    if separator is None:
        return
    if "text" not in kinds:
        raise no_effect("--document-separator", "on this source, which has no files of text")
    files = [n for n, kind in enumerate(kinds) if kind == "text"]
    if separator == EVERY_LINE or any(_has_separator(source, n, separator) for n in files):
        return
    raise UserError(
        "has no effect: no file of text has such a line",
        where=f"--document-separator {separator}",
        fix=f"Give the text of a whole line, {BLANK_LINES} or {EVERY_LINE}, or leave it out.",
        exit_code=ExitCode.NO_EFFECT,
    )


def _has_separator(source: Source, file: int, separator: str) -> bool:
    section = _section(source, FilePart(file, 0, sys.maxsize, 0))
    name = section.name
    with reading_errors(name), decompression_errors(lambda: name, section.compression):
        return any(map(separator_test(separator), section.lines()))


def _read_rows(source: Source, part: FilePart, column: str | None) -> Iterator[Row]:
    """Yields every row of a part of a file, with the values of one column or of all."""
    section = _section(source, part, column)
    name, number = section.name, 0
    damage = decompression_errors(lambda: f"{name}:{number + 1}", section.compression)
    with reading_errors(name), damage:
        for row in READERS[source.formats[part.file].kind](section):
            number = row[0]
            yield row
        if file_stamp(section.path) != source.stamps[part.file]:
            fix = "Run it again when nothing writes to the file any more."
            raise bad_input(name, "the file changed while it was read", fix)


def _section(source: Source, part: FilePart, column: str | None = None) -> Section:
    file, compression = part.file, source.formats[part.file].compression
    return Section(
        source.paths[file],
        source.names[file],
        compression,
        part.start,
        sys.maxsize if compression else part.stop,
        column,
        source.document_separator,
    )


def _default_label(source: Source, file: int) -> str:
    """Returns what the rows of a file are counted under that do not say it themselves."""
    if source.names[file] == STANDARD_INPUT:
        return "stdin"
    name = Path(source.names[file]).name
    is_document = source.formats[file].kind == "text" and source.document_separator is None
    return name if is_document else name.split(".")[0]
