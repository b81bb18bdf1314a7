"""Reading tables of text, .csv and .tsv, whose first line names the columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO, Literal

from kiem.data.read.rows import (
    MAX_DOCUMENT_BYTES,
    Document,
    Problem,
    bad_input,
    no_column,
    record_row,
)

_QUOTES = (
    'A field that begins with a double quote must end with one, and have "" for those in it. Such '
    "rows are not skipped, since nobody can tell where they end."
)


def read_table(
    file: BinaryIO, kind: Literal["csv", "tsv"], name: str, column: str, default_source: str
) -> Iterator[Document]:
    """Yields the rows of a table.

    Args:
        file: the file.
        kind: tsv: tabs are between fields. csv: what is most often between the first line's.
        name: what it is called in messages.
        column: the column that holds the text.
        default_source: what a row without a `source` is counted under.

    Raises:
        UserError: there is no such column, or quotes are not balanced; names the line.
    """
    for number, record in read_table_records(file, kind, name, column):
        if isinstance(record, Problem):
            yield Document("", default_source, number, record)
        else:
            yield record_row(record, number, column, default_source)


def read_table_records(
    file: BinaryIO, kind: Literal["csv", "tsv"], name: str, *needed: str
) -> Iterator[tuple[int, dict[str, str] | Problem]]:
    """Yields each row's first line and its fields by column, or what is wrong with it.

    Bytes that are not UTF-8 become lone surrogates, as "surrogateescape" makes them.
    """
    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # of the process; the usual one is 131 072
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        lines = iter(lambda: text.readline(MAX_DOCUMENT_BYTES + 1), "")
        first = next(lines, "")
        reader = csv.reader(chain([first], lines), delimiter=_delimiter(first, kind), strict=True)
        try:
            columns = next(reader, [])
            _check_columns(columns, needed, name)
            number = reader.line_num + 1
            for fields in reader:
                if len(fields) == len(columns):
                    yield number, dict(zip(columns, fields, strict=True))
                elif fields:
                    yield number, _other_fields(len(fields), len(columns))
                number = reader.line_num + 1
        except csv.Error as error:
            what = f"not a table ({error})"
            raise bad_input(f"{name}:{reader.line_num}", what, _QUOTES) from error


def _delimiter(first_line: str, kind: Literal["csv", "tsv"]) -> str:
    unquoted = re.sub(r'"[^"]*"', "", first_line)
    return "\t" if kind == "tsv" else max(",;\t", key=unquoted.count)


def _check_columns(columns: list[str], needed: tuple[str, ...], name: str) -> None:
    for column in needed:
        if column not in columns:
            problem = no_column(column, columns)
            raise bad_input(
                f"{name}:1", problem.what, f"The first line must name the columns. {problem.fix}"
            )
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if set(twice) & set(needed):
        raise bad_input(
            f"{name}:1", f"has several columns {twice[0]!r}", "Rename or remove the others."
        )


def _other_fields(num_fields: int, num_columns: int) -> Problem:
    return Problem(
        "other number of fields",
        f"has {num_fields} fields; the first line names {num_columns}",
        'Put quotes (") around a field that has the sign between fields in it, or leave such rows '
        "out with --on-bad-document skip.",
    )
