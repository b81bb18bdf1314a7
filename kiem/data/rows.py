"""What the readers give: rows of a file, and why some of them are not documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from kiem.errors import ExitCode, UserError

# A longer one is hardly one document, and there would be copies of it in memory.
MAX_DOCUMENT_BYTES = 256_000_000
BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        text: the document; None when the row is not one.
        source: which source it is counted under.
        number: of the line or row in its piece, from 1.
        problem: why it is not a document; None when it is.
    """

    text: str | None
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


def checked_row(text: Any, source: str, number: int) -> Row:
    """Returns a row with `text` if that can be a document, or with what is wrong with it."""
    if not isinstance(text, str):
        what = f"the text is {type(text).__name__}, not a string"
        fix = "Mend or remove it, or name another column with --text-column."
        return Row(None, source, number, Problem("not a string", what, fix))
    if not text or text.isspace():
        return Row(None, source, number, Problem("empty", "the text is empty"))
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        what = f"half a surrogate pair at character {error.start}"
        return Row(None, source, number, Problem("surrogate", what))
    if num_bytes > MAX_DOCUMENT_BYTES:
        return Row(None, source, number, TOO_LONG)
    return Row(text, source, number)


def no_column(text_column: str, columns: list[str]) -> Problem:
    """Returns the problem of a row or file without the text column."""
    return Problem(
        "no such column",
        f"no column {text_column!r}; there is {', '.join(map(repr, columns)) or 'nothing'}",
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
def reading_errors(name: str) -> Iterator[None]:
    """Turns the operating system's refusals to read into `UserError`s that name the file."""
    try:
        yield
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        fix = "Check that the file is there and that you may read it."
        raise bad_input(name, what, fix) from error
