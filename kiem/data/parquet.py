"""Reading Parquet files, one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kiem.data.rows import NOT_UTF8, Row, bad_input, checked_row, damaged, no_column

_BATCH_ROWS = 1024
_BATCH_BYTES = 1 << 25
_INVALID = object()


def row_groups(path: Path, name: str) -> list[tuple[int, int]]:
    """Returns the number of rows and bytes of each row group; raises a UserError if damaged."""
    with _damage(name), _open(path) as file:
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        sizes = [(group.num_rows, max(0, group.total_byte_size)) for group in groups]
        if sum(num_rows for num_rows, _ in sizes) != file.metadata.num_rows:
            raise ValueError("the row groups have other rows than the file")
        return sizes


def read_row_group(path: Path, group: int, name: str, column: str) -> Iterator[Row]:
    """Yields the rows of a row group.

    Args:
        path: the file.
        group: which row group.
        name: what the file is called in messages.
        column: the column that holds the text.

    Raises:
        UserError: the file is damaged or has no such column of strings.
    """
    default_source = Path(name).name.split(".")[0]
    number = 0
    for texts, labels in _batches(path, group, name, column):
        for text, given in zip(texts, labels, strict=True):
            number += 1
            label = given if isinstance(given, str) and given else default_source
            if text is _INVALID:
                yield Row(None, label, number, NOT_UTF8)
            else:
                yield checked_row(text, label, number)


def _batches(
    path: Path, group: int, name: str, column: str
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yields texts and their labels, None where there are none."""
    num_read = 0
    with _damage(name), _open(path) as file:
        schema, size = file.schema_arrow, file.metadata.row_group(group)
        _check_column(schema, column, name)
        has_label = column != "source" and _is_text(schema, "source")
        wanted = [column, "source"] if has_label else [column]
        row_bytes = max(1, size.total_byte_size) // max(1, size.num_rows)
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
        for batch in file.iter_batches(batch_rows, [group], columns=wanted):
            num_read += batch.num_rows
            texts = _values(batch, column)
            yield texts, _values(batch, "source") if has_label else [None] * len(texts)
        if num_read != size.num_rows:
            raise ValueError(f"{num_read} rows of {size.num_rows}")


def _check_column(schema: Any, column: str, name: str) -> None:
    """Raises a UserError if the file has no one column of strings with this name."""
    import pyarrow as pa

    fix = "Name the column that holds the text with --text-column."
    if column not in schema.names:
        raise no_column(column, schema.names).error(name)
    if schema.names.count(column) > 1:
        raise bad_input(name, f"has several columns {column!r}", "Rename or remove the others.")
    kind = schema.field(column).type
    if not _is_text(schema, column) and not pa.types.is_null(kind):
        raise bad_input(name, f"column {column!r} is {kind}, not a string", fix)


def _is_text(schema: Any, column: str) -> bool:
    """Says whether there is one such column and it holds strings."""
    import pyarrow as pa

    if schema.names.count(column) != 1:
        return False
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view")


def _values(batch: Any, name: str) -> list[Any]:
    """Returns a column's values; `_INVALID` for a string that is not UTF-8."""
    import pyarrow as pa

    column = batch.column(batch.schema.names.index(name))
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        values = []
        for data in column.cast(pa.large_binary()).to_pylist():
            try:
                values.append(data if data is None else data.decode())
            except UnicodeDecodeError:
                values.append(_INVALID)
        return values


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    # Not memory-mapped: a file that shrinks meanwhile would end the program.
    return pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turns what pyarrow raises at damaged files into a UserError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(name, "Parquet", error) from error
