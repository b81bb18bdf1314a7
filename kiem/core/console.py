"""What people see: consoles that show text as it is, and output that ends no work.

Paths, prompts and documents are text of others. None of it is read as markup, no control character
of it reaches the terminal, and a character that the terminal cannot show is shown as "?".
"""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.status import Status
from rich.text import Text


class PlainConsole(Console):
    """A console that takes strings for text: no markup, no emoji codes, no control characters."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False):
        super().__init__(
            stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns what a string looks like: of all strings, those in tables included."""
        return super().render_str(printable(text), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Returns a display of what is going on; rich itself takes its text for markup."""
        text = Text(printable(status)) if isinstance(status, str) else status
        return super().status(text, **options)


def printable(text: str) -> str:
    """Returns text without the control characters that could steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def warn(console: Console, message: str) -> None:
    """Prints a warning: something a person should know but that stops nothing."""
    console.print(Text.assemble(("warning:", "yellow"), f" {printable(message)}"))


def show(console: Console, text: str) -> None:
    """Writes text that the program was started for, as it is and at once.

    Raises:
        BrokenPipeError: nobody reads it any more, so there is no more to do.
    """
    if getattr(console.file, "is_lost", False):
        raise BrokenPipeError
    if not console.quiet:
        console.file.write(printable(text))
        console.file.flush()


class Output(io.TextIOWrapper):
    """Standard output or error that never fails.

    What its encoding has no character for becomes "?". When its reader is gone or its disk is full,
    what comes after goes nowhere: the work goes on without being watched.

    Attributes:
        is_lost: whether that has happened.
    """

    is_lost = False

    def write(self, text: str) -> int:
        """Writes text, if that is still possible."""
        try:
            return super().write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Passes on what was written, if that is still possible."""
        try:
            super().flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        self.is_lost = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # also for what is still in buffers
        os.close(nowhere)


def open_output() -> None:
    """Makes this process's standard streams, and those of its children, such that none can fail.

    A stream that was closed is opened to nowhere: else the next file that is opened would take its
    number, and get what C code prints.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            _open_nowhere(number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    if isinstance(sys.stdout, Output):
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:replace"


def _open_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _lasting(stream: TextIO) -> TextIO:
    if type(stream) is not io.TextIOWrapper:  # one of ours already, or of a program around us
        return stream
    stream.flush()
    size = 0 if stream.write_through else -1  # python -u
    return Output(
        open(stream.fileno(), "wb", size, closefd=False),
        stream.encoding,
        "replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
