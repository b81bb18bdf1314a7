"""Reading lines: of a byte range, and never one that is much longer than a document may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from kiem.data.read.rows import MAX_DOCUMENT_BYTES

_BLOCK_BYTES = 1 << 22


def read_lines(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Yields the lines whose first byte is in a byte range; see `next_line` for very long ones."""
    position = seek_line(file, start, stop)
    while position < stop:
        line, num_bytes = next_line(file)
        if num_bytes == 0:
            return
        position += num_bytes
        yield line


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
    """Returns the next line and its length. One that is too long for a document is cut after that,
    so that memory stays bounded; the rest is passed over."""
    line = file.readline(MAX_DOCUMENT_BYTES + 1)
    num_bytes, part = len(line), line
    while len(line) > MAX_DOCUMENT_BYTES and part and not part.endswith(b"\n"):
        part = file.readline(_BLOCK_BYTES)
        num_bytes += len(part)
    return line, num_bytes
