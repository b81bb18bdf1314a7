"""Rows of files, the documents in them, and what can be wrong with either."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

from kiem.core.errors import UserError, bad_input
from kiem.data.read.source_file import MAX_DOCUMENT_BYTES

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 12  # of a file, by which its type is known
_MISSING = object()
_MOST_COLUMNS_SHOWN = 20
_LONGEST_NAME = 60
UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, with "surrogateescape"
_BEGINNINGS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\3\4": "zip",
    b"%PDF": "PDF",
}


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
    "Convert the file, such as with iconv -t utf-8, or use --on-bad-document skip.",
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


def document_in(row: Row, column: str, default_source: str) -> Document:
    """Returns the document in a row.

    Args:
        row: the row.
        column: the column that holds the text; `a.b` is key b of the object in column a, unless
            there is a column of that name.
        default_source: its source if no column `source` has text.
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
        if column != "source" and "source" in value:
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
    names = [repr(name) for name in islice(columns, _MOST_COLUMNS_SHOWN + 1)]
    names = [name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in names]
    there = ", ".join([*names[:_MOST_COLUMNS_SHOWN], *["..."] * (len(names) > _MOST_COLUMNS_SHOWN)])
    return Problem(
        "no such column",
        f"no column {column!r}; there is {there or 'nothing'}",
        "Name the column that holds the text with --text-column.",
    )


def lfs_pointer(data: bytes) -> Problem | None:
    """Returns the problem of a Git LFS pointer, which clones have in place of large files."""
    if not data.startswith(b"version https://git-lfs.github.com/spec/"):
        return None
    what = "a pointer of Git LFS, not the file itself"
    return Problem("Git LFS pointer", what, "Fetch the file, as with git lfs pull.")


def foreign_content(data: bytes) -> Problem | None:
    """Returns the problem of data that begins as another encoding, type of file or LFS pointer."""
    if (problem := lfs_pointer(data)) is not None:
        return problem
    head = data[:HEAD_BYTES]
    # In Latin text in UTF-16 every second byte is NUL, and no other byte.
    num_nul = sorted((head[::2].count(0), head[1::2].count(0)))
    if len(head) >= 16 and num_nul[0] == 0 and num_nul[1] > len(head) / 4:
        kind = "UTF-16"
    else:
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
            return None
        except UnicodeDecodeError:
            kind = next((kind for start, kind in _BEGINNINGS.items() if head.startswith(start)), "")
    if not kind:
        return None
    if kind in ("zip", "PDF"):
        fix = "Give the text that is in it."
    elif kind.startswith("UTF"):
        fix = f"Convert the file: iconv -f {kind} -t utf-8 FILE > NEW-FILE"
    else:
        fix = "Decompress it, or let its name end as in docs/formats.md."
    return Problem("not UTF-8", f"{kind}, not UTF-8", fix)
