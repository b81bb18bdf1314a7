"""Files of a source, and parts of them: opened, decompressed and cut into lines."""

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
from kiem.hub.repo import RemoteFile

STANDARD_INPUT = "-"
# Longer text is hardly one document, and several copies of it would be in memory.
MAX_DOCUMENT_BYTES = 256_000_000
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_BUFFER_BYTES = 1 << 17
_BLOCK_BYTES = 1 << 22


class SourceFile(NamedTuple):
    """A file of a source.

    Attributes:
        path: where it is.
        name: its name in messages and in the manifest; STANDARD_INPUT for a copy of that.
        kind: what is in it, a key of `formats.READERS`.
        compression: gzip, zstd, bzip2 or xz; None: not compressed.
        separator: what cuts a text file into documents; None: it is one document.
        stamp: its size and the time of its last change, by which a later change is noticed.
        remote: where it comes from; None: it is not downloaded. Until it is, kind is what its name
            says, and stamp says nothing.
        source: the source of all its rows; None: they name it themselves, or the file's name does.
    """

    path: Path
    name: str
    kind: str
    compression: str | None
    separator: str | None
    stamp: tuple[int, int]
    remote: RemoteFile | None = None
    source: str | None = None

    @property
    def label(self) -> str:
        """The source of rows that do not name one."""
        if self.source is not None:
            return self.source
        if self.name == STANDARD_INPUT:
            return "stdin"
        name = Path(self.name).name
        return name if self.kind == "text" and not self.separator else name.split(".")[0]

    def open(self) -> BinaryIO:
        """Opens the file for reading, decompressed."""
        openers: dict[str, Callable[[Path], Any]] = {
            "gzip": gzip.open,
            "bzip2": bz2.open,
            "xz": lzma.open,
            "zstd": _open_zstd,
        }
        if self.compression is None:
            return self.path.open("rb", buffering=_BUFFER_BYTES)
        return cast(BinaryIO, openers[self.compression](self.path))

    def open_text(self) -> io.TextIOWrapper:
        """Opens the file as text; bytes that are not UTF-8 become lone surrogates."""
        return io.TextIOWrapper(self.open(), "utf-8-sig", "surrogateescape", newline="")


class Section(NamedTuple):
    """What a reader reads: a file, or a part of one.

    Attributes:
        file: the file.
        start: first byte (text and lines) or row group (Parquet).
        stop: one past the last. A line belongs to the section that its first byte is in.
        column: the column to read; it must be there. None: all columns.
    """

    file: SourceFile
    start: int
    stop: int
    column: str | None = None

    def lines(self) -> Iterator[bytes]:
        """Yields the lines that begin in the section; see `next_line` for very long ones."""
        with self.file.open() as file:
            position = seek_line(file, self.start, self.stop)
            while position < self.stop:
                line, num_bytes = next_line(file)
                if num_bytes == 0:
                    return
                position += num_bytes
                yield line


def file_stamp(path: Path) -> tuple[int, int]:
    """Returns what changes when a file is written to: its size and the time of its last change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open_zstd(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), _BUFFER_BYTES)


def seek_line(file: BinaryIO, start: int, stop: int) -> int:
    """Seeks the first line that begins in a byte range; returns its position, or `stop`."""
    if start == 0:
        return 0
    # From one byte before: when that is a line end, a line begins with the range.
    position = file.seek(start - 1)
    is_inside = True
    while is_inside and position < stop and (part := file.readline(_BLOCK_BYTES)):
        position += len(part)
        is_inside = not part.endswith(b"\n")
    return stop if is_inside else position


def count_lines(path: Path, start: int, stop: int) -> int:
    """Returns how many lines begin in a byte range of a file, which ends where the file does."""
    num_lines = int(start == 0)
    with path.open("rb", buffering=0) as file:
        # A line begins after each line end from one byte before the range to one before its end.
        position = file.seek(max(0, start - 1))
        while position < stop - 1 and (block := file.read(min(_BLOCK_BYTES, stop - 1 - position))):
            num_lines += block.count(b"\n")
            position += len(block)
    return num_lines


def next_line(file: BinaryIO) -> tuple[bytes, int]:
    """Returns the next line and its length.

    Of a line that is too long for a document only the beginning is returned, to bound memory.
    """
    line = file.readline(MAX_DOCUMENT_BYTES + 1)
    num_bytes, part = len(line), line
    while len(line) > MAX_DOCUMENT_BYTES and part and not part.endswith(b"\n"):
        part = file.readline(_BLOCK_BYTES)
        num_bytes += len(part)
    return line, num_bytes


@contextmanager
def reading_errors(name: str, compression: str | None = None) -> Iterator[None]:
    """Turns errors of reading into a UserError that names the file.

    Args:
        name: the file's name in messages.
        compression: of the file, which may be damaged.
    """
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        is_refusal = isinstance(error, OSError) and error.errno is not None
        if compression is not None and not is_refusal:
            raise damaged_file(name, compression, error) from error
        if not isinstance(error, OSError):
            raise
        what = f"cannot be read ({error.strerror or error})"
        fix = "Check that the file is there and that you may read it."
        raise bad_input(str(error.filename or name), what, fix) from error


def damaged_file(where: str, kind: str, error: Exception) -> UserError:
    """Returns the error for a damaged file. It stops also where bad documents are skipped."""
    # The text of the exception may be several lines with a stack of C++.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    fix = "Fetch or make the file again, or leave it out of --source. It is not skipped, since "
    return bad_input(where, f"damaged {kind} ({reason})", f"{fix}nobody can tell what was lost.")
