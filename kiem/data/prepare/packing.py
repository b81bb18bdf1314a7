"""Documents to chunks of exactly chunk_size tokens; no token is lost.

concat: one document after the other, cut every chunk_size tokens. best-fit: as few documents as
possible are cut (Ding et al. 2024, Fewer Truncations Improve Language Modeling,
https://arxiv.org/abs/2404.10830): a long document fills whole chunks, and what is left of it is put
where it fits best. Padding fills the ends of chunks and is never trained on: text never becomes it.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from kiem.tokenizer.encoding import Encoded

# Documents that best-fit has to choose from. More choice leaves less padding and takes memory.
_WINDOW_TOKENS = 1 << 24
# The share of padding above which best-fit rather cuts documents.
_MAX_PADDING = 0.005


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


class Packer(Protocol):
    """Collects documents and hands them back as chunks.

    Attributes:
        num_padding_tokens: padding in the chunks handed back so far.
    """

    num_padding_tokens: int

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Takes the int32 ids of documents, one after the other, and the length of each."""

    def full_chunks(self) -> np.ndarray:
        """Returns chunks that are ready, int32 [chunks, chunk_size]; the rest keeps waiting."""

    def last_chunks(self) -> np.ndarray:
        """Returns all that still waits, int32 [chunks, chunk_size]."""


def make_packer(packing: Literal["concat", "best-fit"], chunk_size: int, pad_id: int) -> Packer:
    """Returns an empty packer for chunks of `chunk_size` tokens, filled up with `pad_id`."""
    if packing == "concat":
        return ConcatPacker(chunk_size, pad_id)
    return BestFitPacker(chunk_size, pad_id)


class ConcatPacker:
    """One document after the other; only the very last chunk is filled up."""

    def __init__(self, chunk_size: int, pad_id: int):
        self.num_padding_tokens = 0
        self._chunk_size = chunk_size
        self._pad_id = pad_id
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        assert lengths.sum() == len(ids)
        self._waiting.append(ids)
        self._num_waiting += len(ids)

    def full_chunks(self) -> np.ndarray:
        num_chunks = self._num_waiting // self._chunk_size
        if num_chunks == 0:
            return np.empty((0, self._chunk_size), dtype=np.int32)
        ids = np.concatenate(self._waiting)
        cut = num_chunks * self._chunk_size
        self._waiting = [ids[cut:]]
        self._num_waiting = len(ids) - cut
        return ids[:cut].reshape(num_chunks, self._chunk_size)

    def last_chunks(self) -> np.ndarray:
        chunks = self.full_chunks()
        if self._num_waiting == 0:
            return chunks
        last = np.full((1, self._chunk_size), self._pad_id, dtype=np.int32)
        last[0, : self._num_waiting] = np.concatenate(self._waiting)
        self.num_padding_tokens += self._chunk_size - self._num_waiting
        self._waiting, self._num_waiting = [], 0
        return np.concatenate([chunks, last])


class BestFitPacker:
    """Cuts documents that are longer than a chunk, and others only to keep padding small.

    Of a long document the first piece is what its length leaves over after whole chunks; so the
    pieces after it are whole chunks, and no piece without its beginning stands behind another.
    """

    def __init__(self, chunk_size: int, pad_id: int):
        self.num_padding_tokens = 0
        self._chunk_size = chunk_size
        self._pad_id = pad_id
        self._whole: list[np.ndarray] = []
        self._pieces: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        assert lengths.sum() == len(ids)
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            rest = len(document) % self._chunk_size
            if rest:
                # A copy: a view would keep all of `ids` in memory for as long as it waits.
                self._pieces.append(document[:rest].copy())
                self._num_waiting += rest
            if rest < len(document):
                self._whole.append(document[rest:].reshape(-1, self._chunk_size).copy())

    def full_chunks(self) -> np.ndarray:
        chunks = self._take_whole()
        if self._num_waiting < _WINDOW_TOKENS:
            return chunks
        return np.concatenate([chunks, self._pack()])

    def last_chunks(self) -> np.ndarray:
        return np.concatenate([self._take_whole(), self._pack()])

    def _take_whole(self) -> np.ndarray:
        empty = np.empty((0, self._chunk_size), dtype=np.int32)
        chunks = np.concatenate([empty, *self._whole])
        self._whole = []
        return chunks

    def _pack(self) -> np.ndarray:
        """Best-fit decreasing: the longest piece first, each into the fullest chunk it fits in."""
        size = self._chunk_size
        plan: list[list[np.ndarray]] = []
        # Chunks by the room that is left in them, and the rooms that occur as bits of a number.
        by_room: dict[int, list[int]] = {}
        rooms = 0
        for piece in sorted(self._pieces, key=len, reverse=True):
            fitting = rooms >> len(piece)
            if fitting:
                room = len(piece) + (fitting & -fitting).bit_length() - 1
                chunk = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
                plan[chunk].append(piece)
            else:
                room, chunk = size, len(plan)
                plan.append([piece])
            left = room - len(piece)
            if left:
                by_room.setdefault(left, []).append(chunk)
                rooms |= 1 << left
        plan = self._top_up(plan)
        chunks = np.full((len(plan), size), self._pad_id, dtype=np.int32)
        for row, pieces in zip(chunks, plan, strict=True):
            ids = np.concatenate(pieces)
            row[: len(ids)] = ids
        self.num_padding_tokens += chunks.size - self._num_waiting
        self._pieces, self._num_waiting = [], 0
        return chunks

    def _top_up(self, plan: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        """Where documents fit badly, cuts some of them: those in the chunks with the most room.

        These go one after the other into full chunks instead, so that a cut one goes on at the
        start of a chunk and never behind another document.
        """
        size = self._chunk_size
        by_room = sorted(plan, key=lambda pieces: size - sum(map(len, pieces)))
        rooms = np.cumsum([size - sum(map(len, pieces)) for pieces in by_room])
        num_kept = int(np.searchsorted(rooms, _MAX_PADDING * self._num_waiting, side="right"))
        loose = [piece for pieces in by_room[num_kept:] for piece in pieces]
        ids = np.concatenate([np.empty(0, np.int32), *loose])
        cuts = np.split(ids, range(size, len(ids), size)) if len(ids) else []
        return [*by_room[:num_kept], *([cut] for cut in cuts)]
