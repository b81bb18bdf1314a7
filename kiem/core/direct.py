"""Writing large files past the system's page cache, while their SHA-256 is computed.

What goes through the cache costs the core that writes a copy into pages that have to be found
first, half as long as the hash, and the memory that training needs. See open(2), O_DIRECT.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedRandom
from typing import Any

# Whole blocks of any disk.
PIECE_BYTES = 8 << 20
# One is being filled while others are hashed and written.
_NUM_PIECES = 3
# How disks say that they cannot write directly, or not blocks of this size or place.
_NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # only Linux has it


def write_and_hash(file: BufferedRandom, blocks: Iterable[memoryview]) -> str:
    """Fills an empty file; where its file system has no direct writing, through the cache.

    Args:
        file: of `files.new_file`.
        blocks: its bytes in order, in parts of any length.

    Returns:
        The SHA-256 of the bytes as they were in memory, as hexadecimal digits.

    Raises:
        OSError: the system refuses to write.
    """
    digest = hashlib.sha256()
    under_way: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer:
        for piece in _in_pieces(blocks):
            under_way.append(hasher.submit(digest.update, piece))
            under_way.append(writer.submit(_write, file.fileno(), piece))
            while len(under_way) > 2 * (_NUM_PIECES - 1):  # the next piece's memory is in use
                under_way.popleft().result()
        for task in under_way:
            task.result()
    return digest.hexdigest()


def _in_pieces(blocks: Iterable[memoryview]) -> Iterator[memoryview]:
    """Yields the bytes in equal pieces, the last one shorter, in memory that is used in turn."""
    # Mapped memory begins with a page, as direct writing asks.
    ring = [memoryview(mmap.mmap(-1, PIECE_BYTES)) for _ in range(_NUM_PIECES)]
    num_filled = 0
    for block in blocks:
        start = 0
        while start < len(block):
            num_bytes = min(len(block) - start, PIECE_BYTES - num_filled)
            ring[0][num_filled : num_filled + num_bytes] = block[start : start + num_bytes]
            start += num_bytes
            num_filled += num_bytes
            if num_filled == PIECE_BYTES:
                yield ring[0]
                ring.append(ring.pop(0))
                num_filled = 0
    if num_filled:
        yield ring[0][:num_filled]


def _write(descriptor: int, piece: memoryview) -> None:
    """Writes a whole piece, directly as long as all that is written are whole blocks."""
    is_direct = _write_directly(descriptor, len(piece) == PIECE_BYTES)
    while len(piece):
        try:
            piece = piece[os.write(descriptor, piece) :]
        except OSError as error:
            if not is_direct or error.errno not in _NOT_DIRECT:
                raise
        is_direct = _write_directly(descriptor, False)


def _write_directly(descriptor: int, is_wanted: bool) -> bool:
    """Turns direct writing on or off; says whether it is on, which some disks do not allow."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | _O_DIRECT if is_wanted else flags & ~_O_DIRECT
    if wanted == flags:
        return is_wanted
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
    except OSError as error:
        if not is_wanted or error.errno not in _NOT_DIRECT:
            raise
        return False
    return is_wanted
