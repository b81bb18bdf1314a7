"""Readers for Parquet, and for Arrow's own files: streams (as `datasets` saves) and Feather."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kiem.core.errors import bad_input
from kiem.data.read.rows import Row, no_column
from kiem.data.read.source_file import Section, SourceFile, damaged_file

_BATCH_ROWS = 1024
_BATCH_BYTES = 1 << 25
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_AS_BYTES = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}

# The names that lead to a column, more than one if it is in other columns.
ColumnPath = tuple[str, ...]


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
        paths = _find_columns(file.schema_arrow, section)
        yield from _rows(_parquet_batches(file, section, paths), paths, section.column)


def read_arrow(section: Section) -> Iterator[Row]:
    """Yields the rows of an Arrow file; raises as `read_parquet`."""
    with _damage(section.file.name, "Arrow"), _open_arrow(section.file.path) as (schema, batches):
        paths = _find_columns(schema, section)
        yield from _rows((_checked(batch, paths) for batch in batches), paths, section.column)


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    # Not memory-mapped: a file that shrinks meanwhile would end the program.
    return pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)


def _parquet_batches(file: Any, section: Section, paths: dict[str, ColumnPath]) -> Iterator[Any]:
    columns = [".".join(path) for path in paths.values()]
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


@contextmanager
def _open_arrow(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Yields the schema and the record batches, in slices of few rows."""
    import pyarrow as pa

    with path.open("rb") as content:
        is_file = content.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        content.seek(-min(len(_STREAM_END), path.stat().st_size), os.SEEK_END)
        if not is_file and content.read() != _STREAM_END:
            raise ValueError("the end is missing")
    with pa.OSFile(str(path)) as file:
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(file)
        starts = ((b, n) for b in batches for n in range(0, b.num_rows, _BATCH_ROWS))
        yield reader.schema, (batch.slice(start, _BATCH_ROWS) for batch, start in starts)


def _checked(batch: Any, paths: dict[str, ColumnPath]) -> Any:
    """Validates a batch, whose damaged offsets would crash the program."""
    import pyarrow as pa

    batch.validate()
    for path in paths.values():
        array = _array(batch, path)
        if str(array.type) in _AS_BYTES:  # UTF-8 is checked later, row by row
            array = array.view(getattr(pa, _AS_BYTES[str(array.type)])())
        array.validate(full=True)
    return batch


def _rows(
    batches: Iterable[Any], paths: dict[str, ColumnPath], column: str | None
) -> Iterator[Row]:
    number = 1
    for batch in batches:
        texts, *others = (_values(_array(batch, path)) for path in paths.values())
        if column is None:
            rows = (dict(zip(paths, row, strict=True)) for row in zip(texts, *others, strict=True))
        else:  # faster for short texts
            labels = others[0] if others else [None] * len(texts)
            rows = ({"source": s, column: t} for s, t in zip(labels, texts, strict=True))
        yield from enumerate(rows, number)
        number += batch.num_rows


def _find_columns(schema: Any, section: Section) -> dict[str, ColumnPath]:
    """Returns the columns to read: the section's and `source` if that is text, or all."""
    import pyarrow as pa

    column, name = section.column, section.file.name
    if column is None:
        return {name: (name,) for name in schema.names}
    if schema.names.count(column) > 1:
        what = f"has several columns {column!r}"
        raise bad_input(name, what, "Rename or remove the others.")
    columns = list(_columns(schema))
    found = [(path, kind) for path, kind in columns if ".".join(path) == column]
    if not found:
        names = (".".join(path) for path, kind in columns if not pa.types.is_struct(kind))
        raise no_column(column, names).error(name)
    path, kind = min(found, key=lambda entry: len(entry[0]))
    if _plain(kind) not in (*_AS_BYTES, *_AS_BYTES.values()) and not pa.types.is_null(kind):
        fix = "Name the column that holds the text with --text-column."
        raise bad_input(name, f"column {column!r} is {kind}, not a string", fix)
    has_label = column != "source" and schema.names.count("source") == 1
    if has_label and _plain(schema.field("source").type) in _AS_BYTES:
        return {column: path, "source": ("source",)}
    return {column: path}


def _columns(fields: Iterable[Any], before: ColumnPath = ()) -> Iterator[tuple[ColumnPath, Any]]:
    """Yields the paths and types of columns, and of the fields in them."""
    import pyarrow as pa

    for field in fields:
        yield (*before, field.name), field.type
        if pa.types.is_struct(field.type):
            inner = (field.type.field(n) for n in range(field.type.num_fields))
            yield from _columns(inner, (*before, field.name))


def _plain(kind: Any) -> str:
    import pyarrow as pa

    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _array(batch: Any, path: ColumnPath) -> Any:
    import pyarrow.compute as pc

    array = batch.column(batch.schema.names.index(path[0]))
    for name in path[1:]:
        array = pc.struct_field(array, array.type.get_field_index(name))
    return array


def _values(array: Any) -> list[Any]:
    """Returns an array's values; bytes that are not UTF-8 become lone surrogates."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(pa.large_binary()).to_pylist()
    return [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]


@contextmanager
def _damage(name: str, kind: str) -> Iterator[None]:
    """Turns pyarrow's errors into a UserError that names the damaged file."""
    import pyarrow as pa

    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_file(name, kind, error) from error
