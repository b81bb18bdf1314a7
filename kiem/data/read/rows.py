"""Rows of files, the documents in them, and what can be wrong with either."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from kiem.core.errors import UserError, bad_input
from kiem.data.read.source_file import MAX_DOCUMENT_BYTES

BOM = b"\xef\xbb\xbf"
_MISSING = object()
UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, with "surrogateescape"
_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Problem:
    """Why a row is not a document.

    Attributes:
        reason: the name under which such rows are counted.
        what: what is wrong, for the message.
        fix: what to do about it.
    """

    reason: str
    what: str
    fix: str = "Correct or remove it, or leave such documents out with --on-bad-document skip."

    def error(self, place: str, fix: str | None = None) -> UserError:
        """Returns the error that stops the program: this problem at `place`."""
        return bad_input(place, self.what, fix or self.fix)


NOT_UTF8 = Problem(
    "not UTF-8",
    "not UTF-8",
    "Convert the file, such as with iconv -t utf-8; let the name of a compressed file end in .gz, "
    ".zst, .bz2 or .xz; or use --on-bad-document skip.",
)
TOO_LONG = Problem("too long", f"longer than {MAX_DOCUMENT_BYTES // 10**6} MB")
NOT_OBJECT = Problem(
    "not an object", "not a JSON object", 'Each line must be like {"text": "..."}.'
)

# The number of a row in its section, from 1, and its values by column, or its text where there are
# no columns, or what is wrong with it. Bytes that are not UTF-8 are lone surrogates in the text
# (Python's "surrogateescape").
Row: TypeAlias = tuple[int, dict[str, Any] | str | Problem]


class Document(NamedTuple):
    """The document in a row of a file.

    Attributes:
        text: its text; "" when the row is not a document.
        source: the source that it is counted under.
        number: of the line or row in its part, from 1.
        problem: why it is not a document; None when it is.
    """

    text: str
    source: str
    number: int = 0
    problem: Problem | None = None


def document_in(
    row: Row, column: str, default_source: str, *, may_name_source: bool = True
) -> Document:
    """Returns the document in a row.

    Args:
        row: the row.
        column: the column that holds the text; `a.b` is key b of the object in column a, unless
            there is a column of that name.
        default_source: its source if no column `source` has text.
        may_name_source: whether such a column counts.
    """
    number, value = row
    if isinstance(value, Problem):
        return Document("", default_source, number, value)
    text: Any = value
    source = default_source
    if isinstance(value, dict):
        text = value.get(column, _MISSING)
        if text is _MISSING:
            text = next((v for name, v in _columns(value) if name == column), _MISSING)
        if text is _MISSING:
            names = (name for name, v in _columns(value) if not isinstance(v, dict))
            return Document("", default_source, number, no_column(column, names))
        if may_name_source and column != "source" and "source" in value:
            source = _label(value["source"]) or default_source
    problem = _text_problem(text)
    return Document("" if problem else text, source, number, problem)


def _label(value: Any) -> str | None:
    """Returns the source that a row names, if that is text."""
    try:
        return value if isinstance(value, str) and value.encode() else None
    except UnicodeEncodeError:
        return None


def _text_problem(text: Any) -> Problem | None:
    if not isinstance(text, str):
        what = f"the text is {type(text).__name__}, not a string"
        fix = "Correct or remove it, or name another column with --text-column."
        return Problem("not a string", what, fix)
    if not text or text.isspace():
        return Problem("empty", "the text is empty")
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        if UNDECODED.search(text):
            return NOT_UTF8
        return Problem("surrogate", f"half a surrogate pair at character {error.start}")
    return TOO_LONG if num_bytes > MAX_DOCUMENT_BYTES else None


def _columns(record: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the names and values of a record's columns, and of those in objects as `a.b`."""
    for key, value in record.items():
        yield f"{before}{key}", value
        if isinstance(value, dict):
            yield from _columns(value, f"{before}{key}.")


def no_column(column: str, columns: Iterable[str]) -> Problem:
    """Returns the problem of a row or file without the text column."""
    shown = reprlib.Repr()
    shown.maxlist, shown.maxstring = 20, 60
    return Problem(
        "no such column",
        f"no column {column!r}; there is {shown.repr(list(columns))[1:-1] or 'nothing'}",
        "Name the column that holds the text with --text-column.",
    )


def check_column(column: str, columns: list[str], place: str) -> None:
    """Raises a UserError if a file has no such column, or several."""
    if column not in columns:
        raise no_column(column, columns).error(place)
    if columns.count(column) > 1:
        what = f"has several columns {column!r}"
        raise bad_input(place, what, "Rename or remove the others.")


def lfs_pointer(data: bytes) -> Problem | None:
    """Returns the problem of a Git LFS pointer, which clones have in place of large files."""
    what = "a pointer of Git LFS, not the file itself"
    problem = Problem("Git LFS pointer", what, "Fetch the file, as with git lfs pull.")
    return problem if data.startswith(_LFS) else None
