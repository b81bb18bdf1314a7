"""Consoles that show text unchanged, and output whose failure does not end a program.

Paths, prompts and documents come from elsewhere. They are never read as markup, their control
characters do not reach the terminal, and a character that the terminal cannot show becomes "?".
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
    """A console without markup, emoji codes and control characters."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False):
        super().__init__(
            stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns the form of every string that is shown, also in tables."""
        return super().render_str(printable(text), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Returns a status display; rich itself would read its text as markup."""
        text = Text(printable(status)) if isinstance(status, str) else status
        return super().status(text, **options)


def printable(text: str) -> str:
    """Returns text without the control characters that could steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def warn(console: Console, message: str) -> None:
    """Prints a warning."""
    console.print(Text.assemble(("warning:", "yellow"), f" {printable(message)}"))


def show(console: Console, text: str) -> None:
    """Writes a program's result, unchanged and at once.

    Raises:
        BrokenPipeError: its reader is gone, so there is no more to do.
    """
    if getattr(console.file, "is_lost", False):
        raise BrokenPipeError
    if not console.quiet:
        console.file.write(printable(text))
        console.file.flush()


class Output(io.TextIOWrapper):
    """Standard output or error that never fails.

    Characters that its encoding lacks become "?". When its reader is gone or its disk is full, all
    later output is dropped and the program goes on.

    Attributes:
        is_lost: whether output is dropped.
    """

    is_lost = False

    def write(self, text: str) -> int:
        """Writes text, unless output is dropped."""
        try:
            return super().write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Flushes, unless output is dropped."""
        try:
            super().flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        self.is_lost = True
        _send_nowhere(self.fileno())  # also what is still in buffers


def open_output() -> None:
    """Makes the standard streams of this process and its children such that none can fail.

    A closed stream is opened to /dev/null: else the next file that is opened would take its number
    and receive what C code prints.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            _send_nowhere(number)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    if isinstance(sys.stdout, Output):
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:replace"


def _send_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _lasting(stream: TextIO) -> TextIO:
    if type(stream) is not io.TextIOWrapper:  # already an Output, or of a program around this one
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
