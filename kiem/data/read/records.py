"""Reading whole rows, with all their columns, of every kind of file that has columns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from kiem.data.read.arrow_files import read_arrow_records
from kiem.data.read.formats import (
    DECOMPRESSION_ERRORS,
    WITH_COLUMNS,
    decompression_error,
    open_content,
)
from kiem.data.read.json_lines import NOT_OBJECT, is_blank, parse_line
from kiem.data.read.json_values import read_values
from kiem.data.read.lines import read_lines
from kiem.data.read.parquet import read_parquet_records
from kiem.data.read.rows import Problem, bad_input, reading_errors
from kiem.data.read.sources import Source
from kiem.data.read.tables import read_table_records

Record = dict[str, Any]


def read_records(source: Source, fix: str) -> Iterator[tuple[str, str, Record]]:
    """Yields the rows of a source: the file's name, `file:line` and the values by column.

    Args:
        source: where the files are.
        fix: what to do about a row that is no record.

    Raises:
        UserError: a file is damaged or has no columns, or a row is no record; names it.
    """
    for file, name in enumerate(source.names):
        number = 0
        compression = source.formats[file].compression
        try:
            with reading_errors(name):
                for number, record in _read_file(source, file):
                    if isinstance(record, Problem):
                        raise bad_input(f"{name}:{number}", record.what, fix)
                    yield name, f"{name}:{number}", record
        except DECOMPRESSION_ERRORS as error:
            raise decompression_error(f"{name}:{number + 1}", compression, error) from error


def _read_file(source: Source, file: int) -> Iterator[tuple[int, Record | Problem]]:
    path, name, (kind, compression) = source.paths[file], source.names[file], source.formats[file]
    if kind == "parquet":
        yield from enumerate(read_parquet_records(path, name), start=1)
    elif kind == "arrow":
        yield from enumerate(read_arrow_records(path, name), start=1)
    elif kind in ("text", "wikiextractor"):
        raise bad_input(name, "has no columns", f"Give a file with columns: {WITH_COLUMNS}.")
    else:
        with open_content(path, compression) as content:
            if kind == "csv" or kind == "tsv":
                yield from read_table_records(content, kind, name)
            elif kind == "json":
                values = enumerate(read_values(content, name), start=1)
                yield from ((n, v if isinstance(v, dict) else NOT_OBJECT) for n, v in values)
            else:
                lines = enumerate(read_lines(content, 0, sys.maxsize), start=1)
                yield from ((n, parse_line(line)) for n, line in lines if not is_blank(line))
