"""What the readers give: rows of a file, and why some of them are not documents."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from kiem.core.errors import ExitCode, UserError

# A longer one is hardly one document, and there would be copies of it in memory.
MAX_DOCUMENT_BYTES = 256_000_000
BOM = b"\xef\xbb\xbf"
MISSING = object()
HEAD_BYTES = 1 << 12  # which say what a file is
_MOST_COLUMNS_SHOWN = 20
_LONGEST_NAME = 60
_UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of other bytes
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
# What a clone has in place of a large file that was not fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Document(NamedTuple):
    """The document in a row of a file.

    Attributes:
        text: its text; "" when the row is not a document.
        source: which source it is counted under.
        number: of the line or row in its part, from 1.
        problem: why it is not a document; None when it is.
    """

    text: str
    source: str
    number: int
    problem: Problem | None = None


@dataclass(frozen=True)
class Problem:
    """Why a row is not a document.

    Attributes:
        reason: one word or two, under which such rows are counted.
        what: what is wrong, for the message.
        fix: what to do about it.
    """

    reason: str
    what: str
    fix: str = "Mend or remove it, or leave such documents out with --on-bad-document skip."

    def error(self, place: str) -> UserError:
        """Returns the error that stops the program: this problem at `place`."""
        return bad_input(place, self.what, self.fix)


NOT_UTF8 = Problem(
    "not UTF-8",
    "not UTF-8",
    "Convert the file, such as with iconv -t utf-8, or use --on-bad-document skip.",
)
TOO_LONG = Problem("too long", f"longer than {MAX_DOCUMENT_BYTES // 10**6} MB")


def lfs_pointer(data: bytes) -> Problem | None:
    """Returns the problem of a file that only says where its content is; None if it does not."""
    if not data.startswith(_LFS_POINTER):
        return None
    what = "a pointer of Git LFS, not the file itself"
    return Problem("Git LFS pointer", what, "Fetch the file, as with git lfs pull.")


def foreign_content(data: bytes) -> Problem | None:
    """Returns the problem of data that is no text of a person, if its first bytes say what it is.

    That is another encoding, another type of file, or a Git LFS pointer.
    """
    if (problem := lfs_pointer(data)) is not None:
        return problem
    head = data[:HEAD_BYTES]
    # Every second byte of Latin letters in UTF-16 is NUL, and none of the others.
    num_nul = sorted((head[::2].count(0), head[1::2].count(0)))
    if len(head) >= 16 and num_nul[0] == 0 and num_nul[1] > len(head) / 4:
        kind = "UTF-16"
    elif _is_utf8(head):
        return None
    else:
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


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def not_utf8(data: bytes) -> Problem:
    """Returns the problem of a text that is not UTF-8, with what it is instead if that is known."""
    return foreign_content(data) or NOT_UTF8


def checked_row(text: Any, source: str, number: int) -> Document:
    """Returns a row with `text` if that can be a document, or with what is wrong with it."""
    if not isinstance(text, str):
        what = f"the text is {type(text).__name__}, not a string"
        fix = "Mend or remove it, or name another column with --text-column."
        return Document("", source, number, Problem("not a string", what, fix))
    if not text or text.isspace():
        return Document("", source, number, Problem("empty", "the text is empty"))
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        what = f"half a surrogate pair at character {error.start}"
        return Document("", source, number, Problem("surrogate", what))
    if num_bytes > MAX_DOCUMENT_BYTES:
        return Document("", source, number, TOO_LONG)
    return Document(text, source, number)


def checked_undecoded_row(text: Any, source: str, number: int) -> Document:
    """As `checked_row`, of text that was decoded with "surrogateescape"."""
    row = checked_row(text, source, number)
    if row.problem is not None and isinstance(text, str) and _UNDECODED.search(text):
        return Document("", source, number, NOT_UTF8)
    return row


def label(value: Any, default_source: str) -> str:
    """Returns what a row's `source` is called: its own name if that is text, else the file's."""
    try:
        return value if isinstance(value, str) and value.encode() else default_source
    except UnicodeEncodeError:  # half a surrogate pair
        return default_source


def find_value(record: Mapping[str, Any], column: str) -> Any:
    """Returns the value of a column; `a.b` is key b of the object a, unless a column is called so.

    Returns:
        The value, or MISSING.
    """
    if column in record:
        return record[column]
    for dot in re.finditer(r"\.", column):
        inner = record.get(column[: dot.start()])
        if isinstance(inner, Mapping):
            found = find_value(inner, column[dot.end() :])
            if found is not MISSING:
                return found
    return MISSING


def record_row(
    record: Mapping[str, Any], number: int, column: str, default_source: str
) -> Document:
    """Returns the row of an object, or of the fields of a table by column."""
    text = find_value(record, column)
    if text is MISSING:
        names = (
            name
            for key, value in record.items()
            for name in ([f"{key}.{k}" for k in value] if isinstance(value, Mapping) else [key])
        )
        return Document("", default_source, number, no_column(column, names))
    given = record.get("source") if column != "source" else None
    return checked_undecoded_row(text, label(given, default_source), number)


def no_column(text_column: str, columns: Iterable[str]) -> Problem:
    """Returns the problem of a row or file without the text column."""
    names = [repr(name) for name in islice(columns, _MOST_COLUMNS_SHOWN + 1)]
    names = [name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in names]
    there = ", ".join([*names[:_MOST_COLUMNS_SHOWN], *["..."] * (len(names) > _MOST_COLUMNS_SHOWN)])
    return Problem(
        "no such column",
        f"no column {text_column!r}; there is {there or 'nothing'}",
        "Name the column that holds the text with --text-column.",
    )


def bad_input(where: str, what: str, fix: str) -> UserError:
    """Returns the error for input that a person can mend."""
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT)


def damaged(where: str, kind: str, error: Exception) -> UserError:
    """Returns the error for a damaged file. It stops also where bad documents are skipped."""
    # The text of the exception may be several lines with a stack of C++.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    fix = "Fetch or make the file again, or leave it out of --source. It is not skipped, since "
    return bad_input(where, f"damaged {kind} ({reason})", f"{fix}nobody can tell what was lost.")


@contextmanager
def arrow_damage(name: str, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises at damaged files into a UserError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(name, kind, error) from error


@contextmanager
def reading_errors(name: str) -> Iterator[None]:
    """Turns the operating system's refusals to read into `UserError`s that name the file."""
    try:
        yield
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        fix = "Check that the file is there and that you may read it."
        raise bad_input(name, what, fix) from error
