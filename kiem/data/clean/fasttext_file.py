"""Checks of fastText's model files, before the library reads them: it crashes or hangs on a part of
one, such as an interrupted download.

A file has, in little-endian order: two int32 (magic, version); twelve int32 and a double, the first
the dimension, the eighth the kind of model; three int32 (entries, words, labels) and two int64
(tokens, pruned entries); each entry as text ending with a zero byte, an int64, and a byte that is 1
for a label; eight bytes for each pruned entry; a byte, 1 if the matrix after it is quantized; the
input matrix; the same for the output matrix (src/fasttext.cc, dictionary.cc, quantmatrix.cc and
productquantizer.cc of github.com/facebookresearch/fastText).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from kiem.core.errors import UserError, bad_input, not_found

_MAGIC, _SUPERVISED, _IS_LABEL = 793712314, 3, 1
_CENTROIDS = 256
_PREFIX = "__label__"


def read_labels(path: Path, where: str) -> list[str]:
    """Returns the labels of a whole model file, without fastText's prefix.

    Args:
        path: the file.
        where: the option that names it, for the message.

    Raises:
        UserError: it cannot be read, or is no whole model that tells labels of texts.
    """
    fix = "Give a whole fastText model file (.bin or .ftz) that tells languages."
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            labels, end = _walk(data)
            is_whole = end == len(data)
    except OSError as error:
        raise not_found(where, f"cannot be read ({error.strerror})", fix) from error
    except (struct.error, ValueError, IndexError) as error:  # empty, or cut off
        raise _no_model(where, fix) from error
    if not is_whole or not labels:
        raise _no_model(where, fix)
    return labels


def _no_model(where: str, fix: str) -> UserError:
    return bad_input(where, "no fastText model that tells languages, or only a part of one", fix)


def _walk(data: mmap.mmap) -> tuple[list[str], int]:
    """Returns the labels and the place where the file should end."""
    arguments = struct.unpack_from("<14id", data)
    if arguments[0] != _MAGIC or arguments[9] != _SUPERVISED:
        return [], 0
    place = struct.calcsize("<14id")
    num_entries, _, _, _, num_pruned = struct.unpack_from("<3i2q", data, place)
    place += struct.calcsize("<3i2q")
    labels = []
    for _ in range(num_entries):
        if (end := data.find(b"\0", place)) < 0:
            return [], 0
        if data[end + 9] == _IS_LABEL:
            labels.append(data[place:end].decode().removeprefix(_PREFIX))
        place = end + 10
    place += 8 * max(0, num_pruned)
    is_quantized = bool(data[place])
    place = _matrix_end(data, place + 1, is_quantized)
    return labels, _matrix_end(data, place + 1, is_quantized and bool(data[place]))


def _matrix_end(data: mmap.mmap, place: int, is_quantized: bool) -> int:
    if not is_quantized:
        rows, columns = struct.unpack_from("<2q", data, place)
        return place + 16 + 4 * rows * columns
    has_norms, rows, _, num_codes = struct.unpack_from("<?2qi", data, place)
    place = _centroids_end(data, place + struct.calcsize("<?2qi") + num_codes)
    return _centroids_end(data, place + rows) if has_norms else place


def _centroids_end(data: mmap.mmap, place: int) -> int:
    dimension = struct.unpack_from("<4i", data, place)[0]
    return place + 16 + 4 * dimension * _CENTROIDS
