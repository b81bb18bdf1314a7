"""Reading Arrow's own files: streams, as `datasets` writes them, and files (Feather)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kiem.data.read.columns import batch_rows, find_columns, text_array
from kiem.data.read.rows import Document, arrow_damage

_BATCH_ROWS = 1024
_FILE_MAGIC = b"ARROW1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_AS_BYTES = {"string": "binary", "large_string": "large_binary", "string_view": "binary_view"}


def read_arrow(path: Path, name: str, column: str, default_source: str) -> Iterator[Document]:
    """Yields the rows of an Arrow file.

    Args:
        path: the file.
        name: what it is called in messages.
        column: the column that holds the text.
        default_source: what a row without a `source` is counted under.

    Raises:
        UserError: the file is damaged or has no such column of strings.
    """
    with arrow_damage(name, "Arrow"), _open(path) as (schema, batches):
        columns = find_columns(schema, column, name)
        number = 1
        for batch in batches:
            batch.validate()
            _check(text_array(batch, columns.text))
            if columns.has_label:
                _check(batch.column("source"))
            yield from batch_rows(batch, columns, number, default_source)
            number += batch.num_rows


def read_arrow_records(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yields all columns of all rows; raises a UserError if the file is damaged."""
    with arrow_damage(name, "Arrow"), _open(path) as (_, batches):
        for batch in batches:
            batch.validate(full=True)
            yield from batch.to_pylist()


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Gives the schema and the record batches, cut so that few rows are in Python at once."""
    import pyarrow as pa

    with path.open("rb") as content:
        is_file = content.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        content.seek(-min(len(_STREAM_END), path.stat().st_size), os.SEEK_END)
        if not is_file and content.read() != _STREAM_END:
            raise ValueError("the end is missing")
    with pa.OSFile(str(path)) as file:  # not memory-mapped, as Parquet
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(file)
            batches = iter(reader)
        yield reader.schema, (part for batch in batches for part in _cut(batch))


def _cut(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        yield batch.slice(start, _BATCH_ROWS)


def _check(array: Any) -> None:
    """Raises an error at places that are outside of the text, which would end the program."""
    import pyarrow as pa

    if str(array.type) in _AS_BYTES:  # what is not UTF-8 is found later, text by text
        array = array.view(getattr(pa, _AS_BYTES[str(array.type)])())
    array.validate(full=True)
