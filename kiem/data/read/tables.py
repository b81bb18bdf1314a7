"""Reader for tables of text, .csv and .tsv, whose first line names the columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain

from kiem.core.errors import bad_input
from kiem.data.read.rows import Problem, Row, check_column
from kiem.data.read.source_file import MAX_DOCUMENT_BYTES, Section

_QUOTES = (
    'A field that begins with a double quote must end with one, and have "" for those in it. Such '
    "rows are not skipped, since nobody can tell where they end."
)
_DELIMITERS = (
    'Put quotes (") around a field that has the sign between fields in it, or leave such rows out '
    "with --on-bad-document skip."
)


def read_table(section: Section, delimiter: str | None = None) -> Iterator[Row]:
    """Yields the rows of a table, each with the number of its first line.

    Args:
        section: the file.
        delimiter: what is between fields; by default what is most often in the first line.

    Raises:
        UserError: there is no such column, or quotes are not balanced; names the line.
    """
    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # of the process; the usual one is 131 072
    with section.file.open_text() as text:
        lines = iter(lambda: text.readline(MAX_DOCUMENT_BYTES + 1), "")
        first = next(lines, "")
        if delimiter is None:
            delimiter = max(",;\t", key=re.sub(r'"[^"]*"', "", first).count)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        try:
            columns = next(reader, [])
            if section.column is not None:
                check_column(section.column, columns, f"{section.file.name}:1")
            number = reader.line_num + 1
            for fields in reader:
                if len(fields) == len(columns):
                    yield number, dict(zip(columns, fields, strict=True))
                elif fields:
                    what = f"has {len(fields)} fields; the first line names {len(columns)}"
                    yield number, Problem("other number of fields", what, _DELIMITERS)
                number = reader.line_num + 1
        except csv.Error as error:
            where = f"{section.file.name}:{reader.line_num}"
            raise bad_input(where, f"not a table ({error})", _QUOTES) from error
