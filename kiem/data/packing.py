"""Documents to chunks: `<bos> text <eos>` one after the other, cut every chunk_size tokens."""

from __future__ import annotations

import numpy as np

from kiem.data.encoding import Encoded


def frame(encoded: Encoded, bos_id: int, eos_id: int) -> Encoded:
    """Puts every document between `bos_id` and `eos_id`."""
    lengths = encoded.lengths + 2
    ends = np.cumsum(lengths)
    ids = np.empty(lengths.sum(), dtype=np.int32)
    is_text = np.ones(len(ids), dtype=bool)
    for places, token in ((ends - lengths, bos_id), (ends - 1, eos_id)):
        ids[places] = token
        is_text[places] = False
    ids[is_text] = encoded.ids
    return Encoded(ids, lengths)


class Packer:
    """Collects token ids and hands them back as full chunks; loses none.

    Args:
        chunk_size: tokens in a chunk.
        pad_id: fills the end of the very last chunk. Text never becomes this id, so the filling is
            recognized by it and is never trained on.
    """

    def __init__(self, chunk_size: int, pad_id: int):
        self._chunk_size = chunk_size
        self._pad_id = pad_id
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, ids: np.ndarray) -> None:
        """Takes the int32 ids of whole documents, control tokens included."""
        self._waiting.append(ids)
        self._num_waiting += len(ids)

    def full_chunks(self) -> np.ndarray:
        """Returns the chunks that are full, int32 [chunks, chunk_size]; the rest keeps waiting."""
        num_chunks = self._num_waiting // self._chunk_size
        if num_chunks == 0:
            return np.empty((0, self._chunk_size), dtype=np.int32)
        ids = np.concatenate(self._waiting)
        cut = num_chunks * self._chunk_size
        self._waiting = [ids[cut:]]
        self._num_waiting = len(ids) - cut
        return ids[:cut].reshape(num_chunks, self._chunk_size)

    def last_chunk(self) -> np.ndarray:
        """Returns what still waits as a chunk filled with padding, int32 [0 or 1, chunk_size]."""
        assert self._num_waiting < self._chunk_size, "take the full chunks first"
        if self._num_waiting == 0:
            return np.empty((0, self._chunk_size), dtype=np.int32)
        chunk = np.full((1, self._chunk_size), self._pad_id, dtype=np.int32)
        chunk[0, : self._num_waiting] = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        return chunk
