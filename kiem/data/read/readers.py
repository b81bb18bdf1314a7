"""Readers for the documents and records of a source, part by part."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from kiem.core.errors import ExitCode, UserError, bad_input, no_effect
from kiem.data.read.columnar import row_groups
from kiem.data.read.formats import READERS, WITH_COLUMNS
from kiem.data.read.rows import NOT_OBJECT, Document, Problem, Row, document_in
from kiem.data.read.source_file import (
    Section,
    SourceFile,
    count_lines,
    file_stamp,
    reading_errors,
)
from kiem.data.read.sources import Source
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


def list_parts(
    source: Source, part_bytes: int, numbers: Iterable[int] | None = None
) -> list[FilePart]:
    """Returns the parts of files in order, of about `part_bytes` each if a file can be cut.

    Args:
        source: where the files are.
        part_bytes: about the size of a part.
        numbers: of the files; None: all.

    Raises:
        UserError: a file is empty, gone, or a damaged Parquet file.
    """
    parts = []
    for number in range(len(source.files)) if numbers is None else numbers:
        file = source.files[number]
        with reading_errors(file.name):
            size = file.path.stat().st_size
            if size == 0 and file.kind != "text":
                raise bad_input(file.name, "the file is empty", "Remove it.")
            if file.kind == "parquet":
                groups = enumerate(row_groups(file))
                of_file = [FilePart(number, n, n + 1, num_bytes) for n, (_, num_bytes) in groups]
                parts += of_file or [FilePart(number, 0, 0, 0)]
            elif file.compression:
                parts.append(FilePart(number, 0, sys.maxsize, size))
            elif file.kind == "json lines" or (file.kind == "text" and file.separator):
                for start in range(0, size or 1, part_bytes):
                    stop = min(start + part_bytes, size)
                    parts.append(FilePart(number, start, stop, stop - start))
            else:
                parts.append(FilePart(number, 0, size, size))
    return parts


def read_parts(
    source: Source,
    parts: Iterable[FilePart],
    text_column: str,
    on_bad: Literal["stop", "skip"],
    fix: str | None = None,
) -> Iterator[tuple[FilePart, Document]]:
    """Yields the document in every row of some parts, with the part it is in.

    Args:
        source: where the files are.
        parts: which parts of them.
        text_column: the column or key that holds the text.
        on_bad: what to do at a row that is not a document: stop, or yield it with its problem.
        fix: what to do about such a row, if not what the problem says.

    Raises:
        UserError: a damaged file, one that changed since `source` was made, or `on_bad` says so;
            names file and line.
    """
    for part in parts:
        file = source.files[part.file]
        label, may_name_source = file.label, file.source is None
        for row in _read_rows(source, part, text_column):
            document = document_in(row, text_column, label, may_name_source=may_name_source)
            if document.problem is not None and on_bad == "stop":
                raise document.problem.error(place(source, part, document.number), fix)
            yield part, document


def read_documents(source: Source, text_column: str, fix: str) -> Iterator[Document]:
    """Returns the documents of a source, all of which must be good; see `read_parts`.

    What can be checked without reading them is checked at once.
    """
    parts = list_parts(source, sys.maxsize)
    return (document for _, document in read_parts(source, parts, text_column, "stop", fix))


def read_records(source: Source, fix: str) -> Iterator[tuple[FilePart, int, dict[str, Any]]]:
    """Yields the rows of a source: part of a file, number in it and the values by column.

    Raises:
        UserError: a file is damaged or has no columns, or a row is not a record (with `fix`).
    """
    for file in source.files:
        if file.kind == "text":
            columns = f"Give a file with columns: {WITH_COLUMNS}."
            raise bad_input(file.name, "has no columns", columns)
    for part in list_parts(source, sys.maxsize):
        for number, value in _read_rows(source, part, column=None):
            if not isinstance(value, dict):
                problem = value if isinstance(value, Problem) else NOT_OBJECT
                raise problem.error(place(source, part, number), fix)
            yield part, number, value


def _read_rows(source: Source, part: FilePart, column: str | None) -> Iterator[Row]:
    """Yields every row of a part of a file, with the values of one column or of all."""
    file = source.files[part.file]
    with reading_errors(file.name, file.compression):
        yield from READERS[file.kind](Section(file, part.start, part.stop, column))
        if file_stamp(file.path) != file.stamp:
            fix = "Run it again when nothing writes to the file any more."
            raise bad_input(file.name, "the file changed while it was read", fix)


def place(source: Source, part: FilePart, number: int) -> str:
    """Returns `file:line` of a row of a part; counts the lines or rows before the part."""
    num_before = count_rows(source, part.file, 0, part.start)
    return f"{source.files[part.file].name}:{num_before + number}"


def count_rows(source: Source, file: int, start: int, stop: int) -> int:
    """Returns how many lines begin in a byte range of a file, or the rows of row groups."""
    if start == stop:
        return 0
    with reading_errors(source.files[file].name):
        if source.files[file].kind == "parquet":
            return sum(num_rows for num_rows, _ in row_groups(source.files[file])[start:stop])
        return count_lines(source.files[file].path, start, stop)


def rows_before_parts(source: Source, parts: Iterable[FilePart]) -> tuple[dict[FilePart, int], int]:
    """Returns how many lines or rows of its file come before each of some parts in a row.

    Those before the first part are not counted.

    Returns:
        The numbers; and how many come before the part that follows, if it is of the same file.
    """
    before: dict[FilePart, int] = {}
    num_rows, file = 0, None
    for part in parts:
        num_rows = num_rows if part.file == file else 0
        before[part] = num_rows
        file = part.file
        is_parquet = source.files[file].kind == "parquet"
        if is_parquet or part.stop < source.files[file].stamp[0]:  # else it is the file's last
            num_rows += count_rows(source, file, part.start, part.stop)
    return before, num_rows


def check_effects(source: Source, text_column: str) -> None:
    """Raises a UserError if there are no columns to choose from, or nothing is separated."""
    if text_column != "text" and all(file.kind == "text" for file in source.files):
        raise no_effect("--text-column", "on this source, which has no columns")
    separator = source.files[0].separator
    if separator is None:
        return
    files = [file for file in source.files if file.kind == "text"]
    if not files:
        raise no_effect("--document-separator", "on this source, which has no files of text")
    # What is in files that are not downloaded yet is not known.
    if separator == EVERY_LINE or any(file.remote for file in files):
        return
    if any(_has_separator(file, separator) for file in files):
        return
    raise UserError(
        "has no effect: no file of text has such a line",
        where=f"--document-separator {separator}",
        fix=f"Give the text of a whole line, {BLANK_LINES} or {EVERY_LINE}, or leave it out.",
        exit_code=ExitCode.NO_EFFECT,
    )


def _has_separator(file: SourceFile, separator: str) -> bool:
    with reading_errors(file.name, file.compression):
        return any(map(separator_test(separator), Section(file, 0, sys.maxsize).lines()))
