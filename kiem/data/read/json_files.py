"""Readers for JSON Lines, and for JSON that is an array or several values."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from kiem.data.read.rows import BOM, NOT_OBJECT, NOT_UTF8, TOO_LONG, UNDECODED, Problem, Row
from kiem.data.read.source_file import MAX_DOCUMENT_BYTES, Section, damaged_file

_BLOCK_CHARACTERS = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
# Numbers are not used, and Python refuses those of thousands of digits.
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits[:9]))


def read_json_lines(section: Section) -> Iterator[Row]:
    """Yields the object in each line; blank lines are no rows, but are counted."""
    decode = msgspec.json.Decoder().decode
    for number, line in enumerate(section.lines(), start=1):
        try:
            value = decode(line)
        except (ValueError, RecursionError):
            # Where files were joined, later lines begin with a BOM as well.
            if not line.removeprefix(BOM).strip():
                continue
            value = parse_line(line)
        yield number, value if isinstance(value, (dict, Problem)) else NOT_OBJECT


def parse_line(line: bytes) -> Any:
    """Returns the value of a line, or a Problem. Slower than msgspec, but accepts NaN and bytes
    that are not UTF-8 in columns that are not read."""
    if len(line) > MAX_DOCUMENT_BYTES:
        return TOO_LONG
    text = line.removeprefix(BOM).decode("utf-8", "surrogateescape")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if UNDECODED.search(text):
            return NOT_UTF8
        return Problem("not JSON", f"not JSON ({error.msg} at character {error.colno})")
    except RecursionError:
        return Problem("not JSON", "not JSON (nested too deeply)")


def read_json(section: Section) -> Iterator[Row]:
    """Yields the elements of the array that a file holds, or its values if it is no array.

    They are read one by one, so that memory is bounded by the longest one.

    Raises:
        UserError: it is not JSON; names the line.
    """
    with section.file.open_text() as stream:
        text = _JsonText(stream, section.file.name)
        is_array = text.skip("[")
        number = 0
        while (following := text.peek()) and not (is_array and following == "]"):
            if is_array and number and not text.skip(","):
                raise text.error("no comma")
            value = text.value()
            number += 1
            yield number, value if isinstance(value, (dict, str)) else NOT_OBJECT
        if is_array and not text.skip("]"):
            raise text.error("the array does not end")
        if text.peek():
            raise text.error("something stands after the array")


class _JsonText:
    """The rest of a file; only what the next value needs is in memory."""

    def __init__(self, stream: io.TextIOWrapper, name: str):
        self._stream = stream
        self._name = name
        self._buffer = ""
        self._position = 0
        self._num_lines = 0  # before the buffer

    def peek(self) -> str:
        """Returns the next character that is not white space; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._buffer, self._position)
            assert space is not None
            self._position = space.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read():
                return ""

    def skip(self, character: str) -> bool:
        """Skips the next character that is not white space if it is this one; says whether."""
        is_next = self.peek() == character
        self._position += is_next
        return is_next

    def value(self) -> Any:
        """Returns the next value and skips it."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            except json.JSONDecodeError as error:
                if not self._read():
                    raise self.error(error.msg, error.pos) from error
            else:
                # A number at the end of what was read may go on.
                if end < len(self._buffer) or not self._read():
                    self._position = end
                    return value

    def error(self, what: str, position: int | None = None) -> Exception:
        """Returns the error for text that is not JSON, by default at the next character."""
        position = self._position if position is None else position
        line = self._num_lines + self._buffer.count("\n", 0, position) + 1
        return damaged_file(f"{self._name}:{line}", "JSON", ValueError(what))

    def _read(self) -> bool:
        """Drops what was used and reads more; returns False at the end of the file."""
        left = self._buffer[self._position :]
        if len(left) > MAX_DOCUMENT_BYTES:
            raise self.error(f"a value longer than {MAX_DOCUMENT_BYTES // 10**6} MB")
        if not (more := self._stream.read(max(_BLOCK_CHARACTERS, len(left)))):
            return False
        self._num_lines += self._buffer.count("\n", 0, self._position)
        self._buffer, self._position = left + more, 0
        return True
