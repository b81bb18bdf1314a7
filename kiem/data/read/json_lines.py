"""Reading JSON Lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from kiem.core.json_input import JsonError, parse_json
from kiem.data.read.rows import (
    BOM,
    MAX_DOCUMENT_BYTES,
    TOO_LONG,
    Document,
    Problem,
    checked_row,
    label,
    not_utf8,
    record_row,
)

NOT_OBJECT = Problem(
    "not an object", "not a JSON object", 'Each line must be like {"text": "..."}.'
)


def read_json_lines(lines: Iterable[bytes], column: str, default_source: str) -> Iterator[Document]:
    """Yields the rows of JSON Lines.

    Args:
        lines: the lines; blank ones are no rows, but are counted.
        column: the key that holds the text.
        default_source: what a row without a `source` is counted under.
    """
    decode = _line_decoder(column)
    for number, line in enumerate(lines, start=1):
        try:
            row: Any = decode(line)
        except (ValueError, RecursionError):
            # Slower, but takes NaN in other columns, and knows what is wrong. A BOM is where files
            # begin, so where they were put together it is at the start of a later line.
            if not is_blank(line):
                yield _checked_line(line, number, column, default_source)
            continue
        yield checked_row(row.text, label(getattr(row, "label", None), default_source), number)


def is_blank(line: bytes) -> bool:
    """Says whether a line has nothing in it."""
    return not line.removeprefix(BOM).strip()


def parse_line(line: bytes) -> dict[str, Any] | Problem:
    """Returns the object that a line is, or what is wrong with it."""
    if len(line) > MAX_DOCUMENT_BYTES:
        return TOO_LONG
    try:
        value = parse_json(line, is_strict=False)
    except JsonError as error:
        is_text = str(error).startswith("not JSON")
        return Problem("not JSON", str(error)) if is_text else not_utf8(line)
    return value if isinstance(value, dict) else NOT_OBJECT


def _line_decoder(column: str) -> Callable[[bytes], Any]:
    """Returns what decodes the `text` of a line, and its `label` if a column is left for that."""
    if "." in column:  # may be the name of a column, or of one in another
        return _refuse_line
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


def _checked_line(line: bytes, number: int, column: str, default_source: str) -> Document:
    record = parse_line(line)
    if isinstance(record, Problem):
        return Document("", default_source, number, record)
    return record_row(record, number, column, default_source)
