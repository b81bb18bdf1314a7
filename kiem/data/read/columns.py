"""Columns of text in Arrow's tables, as Parquet and Arrow files give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kiem.data.read.rows import NOT_UTF8, Document, bad_input, checked_row, label, no_column

_INVALID = object()
_TEXT = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")


class Columns(NamedTuple):
    """Where in a table the documents are.

    Attributes:
        text: the names from the column to the text in it.
        has_label: whether there is also a column `source` with strings.
    """

    text: tuple[str, ...]
    has_label: bool

    @property
    def wanted(self) -> list[str]:
        """What is to be read, as Parquet writes names."""
        return [".".join(self.text), *(["source"] if self.has_label else [])]


def find_columns(schema: Any, column: str, name: str) -> Columns:
    """Returns where the documents are.

    Args:
        schema: the table's.
        column: the column that holds the text; `a.b` is b in the column a, unless one is called so.
        name: what the file is called in messages.

    Raises:
        UserError: there is no such column, there are several, or it does not hold strings.
    """
    import pyarrow as pa

    fix = "Name the column that holds the text with --text-column."
    if schema.names.count(column) > 1:
        raise bad_input(name, f"has several columns {column!r}", "Rename or remove the others.")
    found = _find(list(schema), column)
    if found is None:
        raise no_column(column, _names(schema)).error(name)
    path, kind = found
    if _plain(kind) not in (*_TEXT, *_BYTES) and not pa.types.is_null(kind):
        raise bad_input(name, f"column {column!r} is {kind}, not a string", fix)
    has_label = column != "source" and schema.names.count("source") == 1
    return Columns(path, has_label and _plain(schema.field("source").type) in _TEXT)


def batch_rows(batch: Any, columns: Columns, first: int, default_source: str) -> Iterator[Document]:
    """Yields the rows of a record batch.

    Args:
        batch: the record batch.
        columns: where the documents are.
        first: number of its first row.
        default_source: what a row without a `source` is counted under.
    """
    texts = _values(text_array(batch, columns.text))
    given = _values(batch.column("source")) if columns.has_label else [None] * len(texts)
    for number, (text, source) in enumerate(zip(texts, given, strict=True), start=first):
        if text is _INVALID:
            yield Document("", label(source, default_source), number, NOT_UTF8)
        else:
            yield checked_row(text, label(source, default_source), number)


def text_array(batch: Any, path: tuple[str, ...]) -> Any:
    """Returns the array that the names of a column and of fields in it lead to."""
    import pyarrow.compute as pc

    array = batch.column(batch.schema.names.index(path[0]))
    for name in path[1:]:
        array = pc.struct_field(array, array.type.get_field_index(name))
    return array


def _find(fields: list[Any], column: str) -> tuple[tuple[str, ...], Any] | None:
    import pyarrow as pa

    for field in fields:
        if field.name == column:
            return (column,), field.type
    for field in fields:
        if column.startswith(f"{field.name}.") and pa.types.is_struct(field.type):
            inner = _find(_fields(field.type), column[len(field.name) + 1 :])
            if inner is not None:
                return (field.name, *inner[0]), inner[1]
    return None


def _names(schema: Any) -> Iterator[str]:
    import pyarrow as pa

    for field in schema:
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in _fields(field.type))
        else:
            yield field.name


def _fields(struct: Any) -> list[Any]:
    return [struct.field(number) for number in range(struct.num_fields)]


def _plain(kind: Any) -> str:
    import pyarrow as pa

    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _values(array: Any) -> list[Any]:
    """Returns an array's texts; `_INVALID` for one that is not UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        values = _values(array.dictionary)
        return [None if n is None else values[n] for n in array.indices.to_pylist()]
    if str(array.type) not in _BYTES:
        try:
            return list(array.to_pylist())
        except UnicodeDecodeError:
            array = array.cast(pa.large_binary())
    return [_decoded(data) for data in array.to_pylist()]


def _decoded(data: bytes | None) -> Any:
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return _INVALID
