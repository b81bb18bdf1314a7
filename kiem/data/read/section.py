"""Parts of files as readers see them: opened, decompressed and cut into lines."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from kiem.core.errors import UserError, bad_input

# A longer document is hardly one document, and there would be copies of it in memory.
MAX_DOCUMENT_BYTES = 256_000_000
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
# What the libraries raise for damaged compressed data: an OSError has no number then.
_DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)
_BUFFER_BYTES = 1 << 17
_BLOCK_BYTES = 1 << 22


class Section(NamedTuple):
    """What a reader reads: a file, or a part of one.

    Attributes:
        path: the file.
        name: what it is called in messages.
        compression: gzip, zstd, bzip2 or xz; None: not compressed.
        start: first byte (text and lines) or row group (Parquet).
        stop: one past the last. A line belongs to the section that its first byte is in.
        column: the column that must be there; None: all columns are read.
        separator: what cuts a text file into documents; None: it is one document.
    """

    path: Path
    name: str
    compression: str | None
    start: int
    stop: int
    column: str | None
    separator: str | None

    def open(self) -> BinaryIO:
        """Opens the whole file, decompressed."""
        return open_content(self.path, self.compression)

    def lines(self) -> Iterator[bytes]:
        """Yields the lines that begin in the section; see `next_line` for very long ones."""
        with self.open() as file:
            position = seek_line(file, self.start, self.stop)
            while position < self.stop:
                line, num_bytes = next_line(file)
                if num_bytes == 0:
                    return
                position += num_bytes
                yield line


def open_content(path: Path, compression: str | None) -> BinaryIO:
    """Opens a file for reading, decompressed."""
    openers: dict[str, Callable[[Path], Any]] = {
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "zstd": _open_zstd,
    }
    if compression is None:
        return path.open("rb", buffering=_BUFFER_BYTES)
    return cast(BinaryIO, openers[compression](path))


def _open_zstd(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), _BUFFER_BYTES)


def seek_line(file: BinaryIO, start: int, stop: int) -> int:
    """Goes to the first line that begins in a byte range; returns where, `stop` or more if none."""
    if start == 0:
        return 0
    # From one byte before: when that is a line end, a line begins with the range.
    position = file.seek(start - 1)
    is_inside = True
    while is_inside and position < stop and (part := file.readline(_BLOCK_BYTES)):
        position += len(part)
        is_inside = not part.endswith(b"\n")
    return stop if is_inside else position


def next_line(file: BinaryIO) -> tuple[bytes, int]:
    """Returns the next line and its length. A line that is too long for a document is cut after
    that, so that memory stays bounded; the rest is skipped."""
    line = file.readline(MAX_DOCUMENT_BYTES + 1)
    num_bytes, part = len(line), line
    while len(line) > MAX_DOCUMENT_BYTES and part and not part.endswith(b"\n"):
        part = file.readline(_BLOCK_BYTES)
        num_bytes += len(part)
    return line, num_bytes


@contextmanager
def reading_errors(name: str) -> Iterator[None]:
    """Turns the operating system's refusals to read into `UserError`s that name the file."""
    try:
        yield
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        fix = "Check that the file is there and that you may read it."
        raise bad_input(name, what, fix) from error


@contextmanager
def decompression_errors(place: Callable[[], str], compression: str | None) -> Iterator[None]:
    """Turns what libraries raise for damaged compressed data into a UserError at `place()`."""
    try:
        yield
    except _DECOMPRESSION_ERRORS as error:
        if compression is None or getattr(error, "errno", None) is not None:  # the disk's fault
            raise
        raise damaged_file(place(), compression, error) from error


def damaged_file(where: str, kind: str, error: Exception) -> UserError:
    """Returns the error for a damaged file. It stops also where bad documents are skipped."""
    # The text of the exception may be several lines with a stack of C++.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    fix = "Fetch or make the file again, or leave it out of --source. It is not skipped, since "
    return bad_input(where, f"damaged {kind} ({reason})", f"{fix}nobody can tell what was lost.")
