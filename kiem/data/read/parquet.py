"""Reading Parquet files, one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kiem.data.read.columns import batch_rows, find_columns
from kiem.data.read.rows import Document, arrow_damage

_BATCH_ROWS = 1024
_BATCH_BYTES = 1 << 25


def row_groups(path: Path, name: str) -> list[tuple[int, int]]:
    """Returns the number of rows and bytes of each row group; raises a UserError if damaged."""
    with arrow_damage(name, "Parquet"), _open(path) as file:
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        sizes = [(group.num_rows, max(0, group.total_byte_size)) for group in groups]
        if sum(num_rows for num_rows, _ in sizes) != file.metadata.num_rows:
            raise ValueError("the row groups have other rows than the file")
        return sizes


def read_row_group(
    path: Path, group: int, name: str, column: str, default_source: str
) -> Iterator[Document]:
    """Yields the rows of a row group.

    Args:
        path: the file.
        group: which row group.
        name: what the file is called in messages.
        column: the column that holds the text.
        default_source: what a row without a `source` is counted under.

    Raises:
        UserError: the file is damaged or has no such column of strings.
    """
    with arrow_damage(name, "Parquet"), _open(path) as file:
        columns = find_columns(file.schema_arrow, column, name)
        number = 1
        for batch in _batches(file, group, columns.wanted):
            yield from batch_rows(batch, columns, number, default_source)
            number += batch.num_rows


def read_parquet_records(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yields all columns of all rows; raises a UserError if the file is damaged."""
    with arrow_damage(name, "Parquet"), _open(path) as file:
        for group in range(file.metadata.num_row_groups):
            for batch in _batches(file, group, None):
                yield from batch.to_pylist()


def _batches(file: Any, group: int, columns: list[str] | None) -> Iterator[Any]:
    size = file.metadata.row_group(group)
    row_bytes = max(1, size.total_byte_size) // max(1, size.num_rows)
    batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
    num_read = 0
    for batch in file.iter_batches(batch_rows, [group], columns=columns):
        num_read += batch.num_rows
        yield batch
    if num_read != size.num_rows:
        raise ValueError(f"{num_read} rows of {size.num_rows}")


def _open(path: Path) -> Any:
    import pyarrow.parquet as pq

    # Not memory-mapped: a file that shrinks meanwhile would end the program.
    return pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)
