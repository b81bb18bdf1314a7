"""Reader for plain text, one document or cut into several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from kiem.data.read.rows import BOM, NOT_UTF8, TOO_LONG, Problem, Row, lfs_pointer
from kiem.data.read.source_file import MAX_DOCUMENT_BYTES, Section, next_line, seek_line

# Values of `--document-separator` that are not the text of a line.
BLANK_LINES = "blank-lines"
EVERY_LINE = "every-line"


def read_text(section: Section) -> Iterator[Row]:
    """Yields the one document that a text file is, or those into which its separator cuts it.

    A document belongs to the section in which the separator before it begins, the first document
    to the first section.
    """
    if section.file.separator is None:
        yield _read_whole(section)
    elif section.file.separator == EVERY_LINE:
        for number, line in enumerate(section.lines(), start=1):
            if (line := line.removeprefix(BOM)).strip():
                yield _text_row(number, line.rstrip(b"\r\n"))
    else:
        yield from _join_lines(_marked_lines(section, separator_test(section.file.separator)))


def separator_test(separator: str) -> Callable[[bytes], bool]:
    """Returns a function that says whether a line separates documents, white space aside."""
    wanted = b"" if separator == BLANK_LINES else separator.strip().encode()
    return lambda line: line.removeprefix(BOM).strip() == wanted


def _read_whole(section: Section) -> Row:
    with section.file.open() as file:
        # `read` allocates all that it is asked for.
        data = file.read(min(MAX_DOCUMENT_BYTES, section.stop) + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        fix = "Cut it into documents with --document-separator, or into several files."
        return 1, Problem(TOO_LONG.reason, TOO_LONG.what, fix)
    if (problem := lfs_pointer(data)) is not None:
        return 1, problem
    return _text_row(1, data.removeprefix(BOM))


def _text_row(number: int, data: bytes) -> Row:
    try:
        return number, data.decode()
    except UnicodeDecodeError as error:
        return number + data.count(b"\n", 0, error.start), NOT_UTF8


# Lines with their numbers; None ends a document.
_Marked = Iterable[tuple[int, bytes | None]]


def _join_lines(lines: _Marked) -> Iterator[Row]:
    """Yields the documents that lines make, without blank lines before and after them."""
    kept: list[bytes] = []
    first = num_bytes = 0
    for number, line in chain(lines, [(0, None)]):
        if line is None:
            if num_bytes > MAX_DOCUMENT_BYTES:
                yield first, TOO_LONG
            elif num_bytes:
                yield _text_row(first, b"".join(kept).rstrip(b"\r\n"))
            kept, num_bytes = [], 0
        elif num_bytes or line.strip():
            first = first if num_bytes else number
            num_bytes += len(line)
            if num_bytes <= MAX_DOCUMENT_BYTES:
                kept.append(line)


def _marked_lines(section: Section, is_separator: Callable[[bytes], bool]) -> _Marked:
    with section.file.open() as file:
        position = seek_line(file, section.start, section.stop)
        is_inside = position == 0  # so that the next line is one of a document of this section
        number = 0
        while position < section.stop or is_inside:
            line, num_bytes = next_line(file)
            if num_bytes == 0:
                return
            number += 1
            if is_separator(line):
                yield number, None
                is_inside = position < section.stop
            elif is_inside:
                yield number, line.removeprefix(BOM) if position == 0 else line
            position += num_bytes
