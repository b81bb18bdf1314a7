"""Readers for JSON Lines, and for JSON that is an array or several values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from kiem.core.errors import bad_input
from kiem.data.read.rows import BOM, NOT_OBJECT, NOT_UTF8, TOO_LONG, UNDECODED, Problem, Row
from kiem.data.read.source_file import MAX_DOCUMENT_BYTES, Section, damaged_file

_NOT_SPACE = re.compile(r"[^ \t\r\n]")
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

    Raises:
        UserError: it is not JSON (names the line), or too long.
    """
    name = section.file.name
    with section.file.open_text() as file:
        text = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        fix = "Make JSON Lines of it, which is read line by line: jq -c '.[]' FILE > NEW-FILE.jsonl"
        raise bad_input(name, f"JSON of more than {MAX_DOCUMENT_BYTES // 10**6} MB", fix)
    rows: list[Any] = []
    position = 0
    try:
        while (start := _NOT_SPACE.search(text, position)) is not None:
            value, position = _DECODER.raw_decode(text, start.start())
            rows += value if isinstance(value, list) else [value]
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise damaged_file(f"{name}:{line}", "JSON", error) from error
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, (dict, str)) else NOT_OBJECT
