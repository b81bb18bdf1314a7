"""Reading files of plain text: one document each, or cut into documents; and WikiExtractor's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from kiem.data.read.lines import next_line, read_lines, seek_line
from kiem.data.read.rows import (
    BOM,
    MAX_DOCUMENT_BYTES,
    NOT_UTF8,
    TOO_LONG,
    Document,
    Problem,
    checked_row,
    foreign_content,
)

# What `--document-separator` takes beside a line of text.
BLANK_LINES = "blank-lines"
EVERY_LINE = "every-line"

_NOT_CLOSED = Problem("not WikiExtractor", "a <doc ...> that no </doc> ends")
_OUTSIDE = Problem("not WikiExtractor", "text outside of <doc ...> and </doc>")


def read_whole_text(file: BinaryIO, stop: int, source: str) -> Document:
    """Returns the one document that a file is, of `stop` bytes or fewer."""
    data = file.read(min(MAX_DOCUMENT_BYTES, stop) + 1)  # memory for all that is asked for is made
    if len(data) > MAX_DOCUMENT_BYTES:
        fix = "Cut it into documents with --document-separator, or into several files."
        return Document("", source, 1, Problem(TOO_LONG.reason, TOO_LONG.what, fix))
    if (problem := foreign_content(data)) is not None:
        return Document("", source, 1, problem)
    return _text_row(data.removeprefix(BOM), source, 1)


def read_separated_text(
    file: BinaryIO, start: int, stop: int, separator: str, source: str
) -> Iterator[Document]:
    """Yields the documents of a byte range of a text file.

    Args:
        file: the file.
        start: first byte of the range.
        stop: one past the last. A document is in the range in which the line begins that separates
            it from the one before; the first document is in the first range.
        separator: the text of a line that separates documents, BLANK_LINES or EVERY_LINE.
        source: what the documents are counted under.
    """
    if separator == EVERY_LINE:
        for number, line in enumerate(read_lines(file, start, stop), start=1):
            if line.removeprefix(BOM).strip():
                yield _text_row(line.removeprefix(BOM).rstrip(b"\r\n"), source, number)
        return
    is_separator = separator_test(separator)
    position = seek_line(file, start, stop)
    number = 0
    is_inside = position == 0  # so that the next line is one of a document of this range
    document = _Document(source)
    while position < stop or is_inside:
        line, num_bytes = next_line(file)
        if num_bytes == 0:
            break
        number += 1
        if is_separator(line):
            yield from document.take()
            is_inside = position < stop
        elif is_inside:
            document.add(line.removeprefix(BOM) if position == 0 else line, number)
        position += num_bytes
    yield from document.take()


def separator_test(separator: str) -> Callable[[bytes], bool]:
    """Returns what says whether a line separates documents; white space around it is no matter."""
    wanted = b"" if separator == BLANK_LINES else separator.strip().encode()
    return lambda line: line.removeprefix(BOM).strip() == wanted


def read_wikiextractor(lines: Iterable[bytes], source: str) -> Iterator[Document]:
    """Yields the documents of a file as WikiExtractor writes them.

    Args:
        lines: `<doc id="..." url="..." title="...">`, the title and the text, `</doc>`.
        source: what the documents are counted under.
    """
    document = _Document(source)
    begun = None
    for number, line in enumerate(lines, start=1):
        stripped = line.removeprefix(BOM).strip()
        is_main = stripped.startswith(b"<doc ") and stripped.endswith(b">")
        if is_main or stripped == b"</doc>":
            if begun is not None and is_main:
                yield Document("", source, begun, _NOT_CLOSED)
                document = _Document(source)
            elif begun is None and not is_main:
                yield Document("", source, number, _OUTSIDE)
            yield from document.take()
            begun = number if is_main else None
        elif begun is not None:
            document.add(line, number)
        elif stripped:
            yield Document("", source, number, _OUTSIDE)
    if begun is not None:
        yield Document("", source, begun, _NOT_CLOSED)


class _Document:
    """The lines of a document until it ends; no more of them than a document may have."""

    def __init__(self, source: str):
        self._source = source
        self._lines: list[bytes] = []
        self._first = self._num_bytes = 0

    def add(self, line: bytes, number: int) -> None:
        """Takes a line; blank ones before the first are left out."""
        if self._num_bytes == 0:
            if not line.strip():
                return
            self._first = number
        self._num_bytes += len(line)
        if self._num_bytes <= MAX_DOCUMENT_BYTES:
            self._lines.append(line)

    def take(self) -> Iterator[Document]:
        """Yields the document, if there is one, and begins the next."""
        if self._num_bytes > MAX_DOCUMENT_BYTES:
            yield Document("", self._source, self._first, TOO_LONG)
        elif self._num_bytes:
            yield _text_row(b"".join(self._lines).rstrip(b"\r\n"), self._source, self._first)
        self._lines, self._num_bytes = [], 0


def _text_row(data: bytes, source: str, number: int) -> Document:
    try:
        return checked_row(data.decode(), source, number)
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        return Document("", source, line, NOT_UTF8)
