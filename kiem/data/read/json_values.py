"""Reading JSON that is not one object a line: an array, or values one after the other.

They are read one by one, so that memory is bounded by the longest one.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from kiem.data.read.json_lines import NOT_OBJECT
from kiem.data.read.rows import (
    MAX_DOCUMENT_BYTES,
    Document,
    checked_undecoded_row,
    damaged,
    record_row,
)

_BLOCK_CHARACTERS = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(file: BinaryIO, name: str, column: str, default_source: str) -> Iterator[Document]:
    """Yields the rows of a JSON file, in which a string by itself is a text.

    Args:
        file: the file.
        name: what it is called in messages.
        column: the key that holds the text.
        default_source: what a row without a `source` is counted under.

    Raises:
        UserError: it is not JSON; names the line.
    """
    for number, value in enumerate(read_values(file, name), start=1):
        if isinstance(value, str):
            yield checked_undecoded_row(value, default_source, number)
        elif isinstance(value, dict):
            yield record_row(value, number, column, default_source)
        else:
            yield Document("", default_source, number, NOT_OBJECT)


def read_values(file: BinaryIO, name: str) -> Iterator[Any]:
    """Yields the elements of the array that a file holds, or its values if it is no array.

    Bytes that are not UTF-8 become lone surrogates, as "surrogateescape" makes them.

    Raises:
        UserError: it is not JSON; names the line.
    """
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as stream:
        text = _Text(stream, name)
        yield from _elements(text) if text.peek() == "[" else _values(text)
        if text.peek():
            raise text.error("something stands after the array")


def _values(text: _Text) -> Iterator[Any]:
    while text.peek():
        yield text.value()


def _elements(text: _Text) -> Iterator[Any]:
    text.take()
    if text.peek() == "]":
        text.take()
        return
    end = ""
    while end != "]":
        yield text.value()
        if (end := text.peek()) not in (",", "]"):
            raise text.error("no comma" if end else "the array does not end")
        text.take()


class _Text:
    """The rest of a file, of which so much is in memory as the next value needs."""

    def __init__(self, stream: io.TextIOWrapper, name: str):
        self._stream = stream
        self._name = name
        self._decoder = json.JSONDecoder(parse_int=_number)
        self._buffer = ""
        self._position = 0
        self._num_lines = 0  # before the buffer

    def peek(self) -> str:
        """Returns the next character that is no white space; "" at the end of the file."""
        while True:
            end = _SPACE.match(self._buffer, self._position)
            assert end is not None
            self._position = end.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read():
                return ""

    def take(self) -> None:
        """Goes beyond the character that `peek` found."""
        self._position += 1

    def value(self) -> Any:
        """Returns the next value and goes beyond it."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
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
        return damaged(f"{self._name}:{line}", "JSON", ValueError(what))

    def _read(self) -> bool:
        """Drops what was read and reads as much again as is left; False at the end of the file."""
        left = self._buffer[self._position :]
        if len(left) > MAX_DOCUMENT_BYTES:
            raise self.error(f"a value longer than {MAX_DOCUMENT_BYTES // 10**6} MB")
        if not (more := self._stream.read(max(_BLOCK_CHARACTERS, len(left)))):
            return False
        self._num_lines += self._buffer.count("\n", 0, self._position)
        self._buffer, self._position = left + more, 0
        return True


def _number(digits: str) -> int:
    # The numbers are not used, and Python refuses those of thousands of digits.
    return int(digits[:9])
