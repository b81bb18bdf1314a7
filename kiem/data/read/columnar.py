"""Readers for Parquet, and for Arrow's own files: streams (as `datasets` saves) and Feather."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow as pa

from kiem.core.errors import bad_input
from kiem.data.read.rows import Row, check_column
from kiem.data.read.source_file import Section, SourceFile, damaged_file

_BATCH_ROWS = 1024
_BATCH_BYTES = 1 << 25
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_AS_BYTES = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}


def row_groups(source_file: SourceFile) -> list[tuple[int, int]]:
    """Returns the number of rows and bytes of each row group of a Parquet file.

    Raises:
        UserError: the file is damaged.
    """
    with _damage(source_file.name, "Parquet"), _open_parquet(source_file.path) as file:
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        sizes = [(group.num_rows, max(0, group.total_byte_size)) for group in groups]
        if sum(num_rows for num_rows, _ in sizes) != file.metadata.num_rows:
            raise ValueError("the row groups have other rows than the file")
        return sizes


def read_parquet(section: Section) -> Iterator[Row]:
    """Yields the rows of the row groups of a section.

    Raises:
        UserError: the file is damaged or has no such column of strings.
    """
    with _damage(section.file.name, "Parquet"), _open_parquet(section.file.path) as file:
        columns = _find_columns(file.schema_arrow, section)
        yield from _rows(_parquet_batches(file, section, columns), columns, section.column)


def read_arrow(section: Section) -> Iterator[Row]:
    """Yields the rows of an Arrow file; raises as `read_parquet`."""
    with _damage(section.file.name, "Arrow"), pa.OSFile(str(section.file.path)) as file:
        is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        file.seek(max(0, file.size() - len(_STREAM_END)))
        if not is_file and file.read() != _STREAM_END:
            raise ValueError("the end is missing")
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(file)
        starts = ((b, n) for b in batches for n in range(0, b.num_rows, _BATCH_ROWS))
        slices = (batch.slice(start, _BATCH_ROWS) for batch, start in starts)
        yield from _rows(slices, _find_columns(reader.schema, section), section.column)


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    # Not memory-mapped: a file that shrinks meanwhile would end the program.
    return pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)


def _parquet_batches(file: Any, section: Section, columns: list[str]) -> Iterator[Any]:
    for group in range(section.start, section.stop):
        size = file.metadata.row_group(group)
        row_bytes = max(1, size.total_byte_size) // max(1, size.num_rows)
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
        num_read = 0
        for batch in file.iter_batches(batch_rows, [group], columns=columns):
            num_read += batch.num_rows
            yield batch
        if num_read != size.num_rows:
            raise ValueError(f"{num_read} rows of {size.num_rows}")


def _rows(batches: Iterable[Any], columns: list[str], column: str | None) -> Iterator[Row]:
    number = 1
    for batch in batches:
        batch.validate()
        table = _flatten(pa.Table.from_batches([batch]), column)
        arrays = [table.column(table.schema.names.index(name)).chunk(0) for name in columns]
        values = [_values(array) for array in arrays]
        rows: Iterator[dict[str, Any]]
        if column is None:
            rows = (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))
        else:  # in a third of the time
            texts, labels = values[0], values[-1] if len(values) > 1 else repeat(None)
            rows = (
                {"source": label, column: text} for text, label in zip(texts, labels, strict=False)
            )
        yield from enumerate(rows, number)
        number += batch.num_rows


def _find_columns(schema: Any, section: Section) -> list[str]:
    """Returns the columns to read: the section's and `source` if that is text, or all."""
    column, name = section.column, section.file.name
    fields = _flatten(schema.empty_table(), column).schema
    if column is None:
        return list(dict.fromkeys(fields.names))
    check_column(column, fields.names, name)
    if not _is_text(fields.field(column).type):
        fix = "Name the column that holds the text with --text-column."
        what = f"column {column!r} is {fields.field(column).type}, not a string"
        raise bad_input(name, what, fix)
    may_have_label = column != "source" and section.file.source is None
    has_label = may_have_label and fields.names.count("source") == 1
    return [column, "source"] if has_label and _is_text(fields.field("source").type) else [column]


def _flatten(table: Any, column: str | None) -> Any:
    """Returns a table with the fields of structs as columns (a.b), down to the one of this name."""
    while column not in (None, *table.schema.names):
        if not any(map(pa.types.is_struct, table.schema.types)):
            break
        table = table.flatten()
    return table


def _is_text(kind: Any) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(plain) in {*_AS_BYTES, *_AS_BYTES.values(), "null"}


def _values(array: Any) -> list[Any]:
    """Returns an array's values; bytes that are not UTF-8 become lone surrogates."""
    as_bytes = array
    if str(array.type) in _AS_BYTES:  # UTF-8 is checked later, row by row
        as_bytes = array.view(getattr(pa, _AS_BYTES[str(array.type)])())
    as_bytes.validate(full=True)  # damaged offsets would crash the program
    if as_bytes is not array:
        with contextlib.suppress(UnicodeDecodeError):
            return array.to_pylist()
    values = as_bytes.to_pylist()
    return [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]


@contextmanager
def _damage(name: str, kind: str) -> Iterator[None]:
    """Turns pyarrow's errors into a UserError that names the damaged file."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_file(name, kind, error) from error
