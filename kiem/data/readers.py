"""Reading the documents of one piece of a file: a byte range, some row groups, or the whole."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from kiem.data.sources import Source
from kiem.errors import ExitCode, UserError

_PARQUET_BATCH_ROWS = 1024
_BLOCK_BYTES = 1 << 22
_BOM = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """A part of a file that can be read by itself.

    Attributes:
        file: number of the file in its source.
        start: first byte (JSON Lines), first row group (Parquet) or 0.
        stop: one past the last. A line belongs to the piece that its first byte is in.
        num_bytes: about how much of the file it is, for progress.
    """

    file: int
    start: int
    stop: int
    num_bytes: int


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        text: the document; None when the row is not one.
        source: which source it is counted under.
        number: of the line or row in its piece, from 1.
        problem: why it is not a document; None when it is.
    """

    text: str | None
    source: str
    number: int
    problem: Problem | None = None


@dataclass(frozen=True)
class Problem:
    """Why a row is not a document.

    Attributes:
        reason: one word or two, under which such rows are counted.
        what: what is wrong, for the message.
        fix: what to do about it.
    """

    reason: str
    what: str
    fix: str = "Mend or remove it, or leave such documents out with --on-bad-document skip."

    def error(self, place: str) -> UserError:
        """Returns the error that stops the program: this problem at `place`."""
        return UserError(self.what, where=place, fix=self.fix, exit_code=ExitCode.BAD_INPUT)


_INVALID = object()
_NOT_UTF8 = Problem(
    "not UTF-8",
    "not UTF-8",
    "Convert the file, such as with iconv -t utf-8, or use --on-bad-document skip.",
)


def cut_file(path: Path, file: int, piece_bytes: int) -> list[Piece]:
    """Returns the pieces of a file, each of some `piece_bytes` where its type can be cut.

    Raises:
        UserError: it is empty, or a damaged Parquet file.
    """
    size = path.stat().st_size
    if size == 0:
        raise _bad_input(str(path), "the file is empty", "Remove it from --source.")
    if path.suffix == ".jsonl":
        starts = range(0, size, piece_bytes)
        stops = [min(start + piece_bytes, size) for start in starts]
        return [Piece(file, a, b, b - a) for a, b in zip(starts, stops, strict=True)]
    if path.suffix != ".parquet":
        return [Piece(file, 0, size, size)]
    metadata = _open_parquet(path, str(path)).metadata
    sizes = [metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups)]
    return [Piece(file, group, group + 1, num_bytes) for group, num_bytes in enumerate(sizes)]


def cut_source(source: Source, piece_bytes: int) -> list[Piece]:
    """Returns the pieces of all files of a source, in order; raises as `cut_file`."""
    return [
        piece for n, path in enumerate(source.paths) for piece in cut_file(path, n, piece_bytes)
    ]


def read_rows(
    source: Source, pieces: Iterable[Piece], text_column: str, on_bad: Literal["stop", "skip"]
) -> Iterator[tuple[Piece, Row]]:
    """Yields every row of some pieces, with the piece it is in.

    Args:
        source: where the files are.
        pieces: which parts of them.
        text_column: the column or key that holds the text.
        on_bad: what to do at a row that is no document: stop, or yield it with its problem.

    Raises:
        UserError: a damaged file, or `on_bad` says so; names file and line.
    """
    for piece in pieces:
        path, name = source.paths[piece.file], source.names[piece.file]
        for row in read_piece(path, name, piece, text_column):
            if row.problem is not None and on_bad == "stop":
                raise row.problem.error(place(path, name, piece, row.number))
            yield piece, row


def read_piece(path: Path, name: str, piece: Piece, text_column: str) -> Iterator[Row]:
    """Yields every row of a piece, whether it is a document or not.

    Args:
        path: the file.
        name: what the file is called in messages.
        piece: which part of it.
        text_column: the column or key that holds the text.

    Raises:
        UserError: the file itself is damaged or has no such column; names it.
    """
    try:
        if path.suffix == ".txt":
            yield _text_file(path, name)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(path, name, piece, text_column)
        elif path.suffix == ".gz":
            yield from _gzip_lines(path, name, text_column)
        else:
            yield from _json_rows(_lines(path, piece), name, text_column)
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise _bad_input(name, what, "Check the file.") from error


def place(path: Path, name: str, piece: Piece, number: int) -> str:
    """Returns `file:line` of a row of a piece; counts the lines or rows before the piece."""
    return f"{name}:{count_rows(path, piece._replace(start=0, stop=piece.start)) + number}"


def count_rows(path: Path, piece: Piece) -> int:
    """Returns the number of lines (JSON Lines) or rows (Parquet) that are in a piece."""
    if piece.start == piece.stop:
        return 0
    if path.suffix == ".parquet":
        metadata = _open_parquet(path, str(path)).metadata
        return sum(metadata.row_group(g).num_rows for g in range(piece.start, piece.stop))
    return sum(1 for _ in _lines(path, piece))


def _lines(path: Path, piece: Piece) -> Iterator[bytes]:
    """Yields the lines that begin in a piece."""
    with path.open("rb", buffering=_BLOCK_BYTES) as file:
        position = piece.start
        if piece.start > 0:
            # From one byte before: when that is a line end, a line begins with the piece.
            file.seek(piece.start - 1)
            position = piece.start - 1 + len(file.readline())
        while position < piece.stop and (line := file.readline()):
            position += len(line)
            yield line


def _gzip_lines(path: Path, name: str, text_column: str) -> Iterator[Row]:
    number = 0
    with gzip.open(path, "rb") as file:
        try:
            for row in _json_rows(file, name, text_column):
                number = row.number
                yield row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = f"damaged gzip ({error})"
            raise _bad_input(
                f"{name}:{number + 1}", what, "Fetch or make the file again."
            ) from error


def _json_rows(lines: Any, name: str, text_column: str) -> Iterator[Row]:
    default_source = Path(name).name.split(".")[0]
    decode = _line_decoder(text_column)
    for number, raw_line in enumerate(lines, start=1):
        line = raw_line.removeprefix(_BOM) if number == 1 else raw_line
        try:
            row: Any = decode(line)
        except (ValueError, RecursionError):
            if line.strip():
                # Slower, but takes NaN in other columns, and knows what is wrong.
                yield _json_row(line, number, text_column, default_source)
            continue
        label = getattr(row, "label", None)
        yield _checked(row.text, label if isinstance(label, str) else default_source, number)


def _line_decoder(text_column: str) -> Callable[[bytes], Any]:
    """Returns what decodes the `text` of a line, and its `label` if a column is left for that."""
    fields: list[Any] = [("text", str)]
    names = {"text": text_column}
    if text_column != "source":
        fields.append(("label", Any, None))
        names["label"] = "source"
    try:
        layout = msgspec.defstruct("Line", fields, rename=names)
    except ValueError:  # a name with a quote or control character, which msgspec does not take
        return _refuse_line
    return msgspec.json.Decoder(layout).decode


def _refuse_line(line: bytes) -> Any:
    raise ValueError(line)


def _json_row(line: bytes, number: int, text_column: str, default_source: str) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return Row(None, default_source, number, _NOT_UTF8)
    except (ValueError, RecursionError) as error:
        return Row(None, default_source, number, Problem("not JSON", f"not JSON ({error})"))
    if not isinstance(row, dict):
        fix = 'Each line must be like {"text": "..."}.'
        problem = Problem("not an object", "not a JSON object", fix)
        return Row(None, default_source, number, problem)
    if text_column not in row:
        return Row(None, default_source, number, _no_column(text_column, list(row)))
    label = row.get("source") if text_column != "source" else None
    return _checked(row[text_column], label if isinstance(label, str) else default_source, number)


def _text_file(path: Path, name: str) -> Row:
    data = path.read_bytes().removeprefix(_BOM)
    source = Path(name).name
    try:
        return _checked(data.decode(), source, 1)
    except UnicodeDecodeError as error:
        return Row(None, source, data[: error.start].count(b"\n") + 1, _NOT_UTF8)


def _parquet_rows(path: Path, name: str, piece: Piece, text_column: str) -> Iterator[Row]:
    import pyarrow as pa

    default_source = Path(name).name.split(".")[0]
    number = 0
    with _open_parquet(path, name) as file:
        columns = file.schema_arrow.names
        if text_column not in columns:
            raise _no_column(text_column, columns).error(name)
        has_label = "source" in columns and text_column != "source"
        wanted = [text_column, "source"] if has_label else [text_column]
        groups = range(piece.start, piece.stop)
        batches = file.iter_batches(_PARQUET_BATCH_ROWS, groups, columns=wanted)
        try:
            for batch in batches:
                texts = _column(batch, text_column)
                given = _column(batch, "source") if has_label else [None] * len(texts)
                for text, source in zip(texts, given, strict=True):
                    number += 1
                    label = source if isinstance(source, str) else default_source
                    if text is _INVALID:
                        yield Row(None, label, number, _NOT_UTF8)
                    else:
                        yield _checked(text, label, number)
        except (pa.ArrowException, OSError) as error:
            # The text of the exception may be several lines with a stack of C++.
            what = f"damaged Parquet ({str(error).splitlines()[0]})"
            raise _bad_input(name, what, "Fetch or make the file again.") from error


def _column(batch: Any, name: str) -> list[Any]:
    """Returns a column's values; `_INVALID` for a string that is not UTF-8."""
    import pyarrow as pa

    column = batch.column(batch.schema.get_field_index(name))
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


def _open_parquet(path: Path, name: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        what = f"damaged Parquet ({str(error).splitlines()[0]})"
        raise _bad_input(name, what, "Fetch or make the file again.") from error


def _checked(text: Any, source: str, number: int) -> Row:
    if not isinstance(text, str):
        what = f"the text is {type(text).__name__}, not a string"
        fix = "Mend or remove it, or name another column with --text-column."
        return Row(None, source, number, Problem("not a string", what, fix))
    if not text or text.isspace():
        return Row(None, source, number, Problem("empty", "the text is empty"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"half a surrogate pair at character {error.start}"
        return Row(None, source, number, Problem("surrogate", what))
    return Row(text, source, number)


def _no_column(text_column: str, columns: list[str]) -> Problem:
    return Problem(
        "no such column",
        f"no column {text_column!r}; there is {', '.join(map(repr, columns)) or 'nothing'}",
        "Name the column that holds the text with --text-column.",
    )


def _bad_input(where: str, what: str, fix: str) -> UserError:
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT)
