"""Reading JSON Lines: a byte range of a plain file, or the whole of a compressed one."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from kiem.data.rows import (
    BOM,
    MAX_DOCUMENT_BYTES,
    NOT_UTF8,
    TOO_LONG,
    Problem,
    Row,
    checked_row,
    damaged,
    no_column,
)

_BLOCK_BYTES = 1 << 22


def read_lines(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yields the lines whose first byte is in a byte range; see `_next_line` for very long ones."""
    with path.open("rb", buffering=_BLOCK_BYTES) as file:
        position = start
        if start > 0:
            # From one byte before: when that is a line end, a line begins with the range.
            position = file.seek(start - 1)
            is_inside = True
            while is_inside and position < stop and (part := file.readline(_BLOCK_BYTES)):
                position += len(part)
                is_inside = not part.endswith(b"\n")
        while position < stop:
            line, num_bytes = _next_line(file)
            if num_bytes == 0:
                return
            position += num_bytes
            yield line


def read_json_lines(path: Path, start: int, stop: int, name: str, column: str) -> Iterator[Row]:
    """Yields the rows of a byte range of a JSON Lines file.

    Args:
        path: the file.
        start: first byte.
        stop: one past the last; a line is in the range that its first byte is in.
        name: what the file is called in messages.
        column: the key that holds the text.
    """
    yield from _json_rows(read_lines(path, start, stop), name, column)


def read_gzip(path: Path, name: str, column: str) -> Iterator[Row]:
    """Yields the rows of a .jsonl.gz file; raises a UserError where it is damaged."""
    number = 0
    with gzip.open(path, "rb") as file:
        lines = iter(lambda: _next_line(file)[0], b"")
        try:
            for row in _json_rows(lines, name, column):
                number = row.number
                yield row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged(f"{name}:{number + 1}", "gzip", error) from error


def _next_line(file: BinaryIO | gzip.GzipFile) -> tuple[bytes, int]:
    """Returns the next line and its length. One that is too long for a document is cut after that,
    so that memory stays bounded; the rest is passed over."""
    line = file.readline(MAX_DOCUMENT_BYTES + 1)
    num_bytes, part = len(line), line
    while len(line) > MAX_DOCUMENT_BYTES and part and not part.endswith(b"\n"):
        part = file.readline(_BLOCK_BYTES)
        num_bytes += len(part)
    return line, num_bytes


def _json_rows(lines: Iterable[bytes], name: str, column: str) -> Iterator[Row]:
    default_source = Path(name).name.split(".")[0]
    decode = _line_decoder(column)
    for number, line in enumerate(lines, start=1):
        try:
            row: Any = decode(line)
        except (ValueError, RecursionError):
            # Slower, but takes NaN in other columns, and knows what is wrong. A BOM is where files
            # begin, so where they were put together it is at the start of a later line.
            line = line.removeprefix(BOM)
            if line.strip():
                yield _json_row(line, number, column, default_source)
            continue
        label = _label(getattr(row, "label", None), default_source)
        yield checked_row(row.text, label, number)


def _line_decoder(column: str) -> Callable[[bytes], Any]:
    """Returns what decodes the `text` of a line, and its `label` if a column is left for that."""
    fields: list[Any] = [("text", str)]
    names = {"text": column}
    if column != "source":
        fields.append(("label", Any, None))
        names["label"] = "source"
    try:
        layout = msgspec.defstruct("Line", fields, rename=names)
    except ValueError:  # a name with a quote or control character, which msgspec does not take
        return _refuse_line
    return msgspec.json.Decoder(layout).decode


def _refuse_line(line: bytes) -> Any:
    raise ValueError(line)


def _json_row(line: bytes, number: int, column: str, default_source: str) -> Row:
    def bad(problem: Problem) -> Row:
        return Row(None, default_source, number, problem)

    if len(line) > MAX_DOCUMENT_BYTES:
        return bad(TOO_LONG)
    try:
        row = json.loads(line.decode(), parse_int=_parse_int)
    except UnicodeDecodeError:
        return bad(NOT_UTF8)
    except json.JSONDecodeError as error:
        return bad(Problem("not JSON", f"not JSON ({error.msg} at character {error.pos + 1})"))
    except RecursionError:
        return bad(Problem("not JSON", "not JSON (nested too deeply)"))
    if not isinstance(row, dict):
        fix = 'Each line must be like {"text": "..."}.'
        return bad(Problem("not an object", "not a JSON object", fix))
    if column not in row:
        return bad(no_column(column, list(row)))
    label = _label(row.get("source") if column != "source" else None, default_source)
    return checked_row(row[column], label, number)


def _parse_int(digits: str) -> int:
    # The numbers are not used, and Python refuses those of thousands of digits.
    return int(digits[:9])


def _label(value: Any, default_source: str) -> str:
    """Returns what a row's `source` is called: its own name if that is text, else the file's."""
    try:
        return value if isinstance(value, str) and value.encode() else default_source
    except UnicodeEncodeError:  # half a surrogate pair
        return default_source
