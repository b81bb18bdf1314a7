"""Packing of documents into chunks of exactly chunk_size tokens; no token is lost.

concat: one document after the other, cut every chunk_size tokens. best-fit: as few documents as
possible are cut (Ding et al. 2024, Fewer Truncations Improve Language Modeling,
https://arxiv.org/abs/2404.10830): a long document fills whole chunks, and what is left of it is put
where it fits best. Padding fills the ends of chunks and is never trained on: text never becomes it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from kiem.data.chunks import NO_SOURCE
from kiem.data.documents import make_pieces
from kiem.tokenizer.encoding import Encoded

# Documents that best-fit has to choose from. More choice leaves less padding and takes memory.
_WINDOW_TOKENS = 1 << 24
# The share of padding above which best-fit rather cuts documents.
_MAX_PADDING = 0.005
_PADDING = make_pieces(position=[0], start=0, file=NO_SOURCE, row=0, source=NO_SOURCE)

Packing = Literal["concat", "best-fit"]


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


class ConcatPacker:
    """Collects documents and returns them as chunks; only the very last chunk is filled up.

    Attributes:
        num_padding_tokens: padding in the chunks returned so far.
    """

    def __init__(self, chunk_size: int, pad_id: int):
        self.num_padding_tokens = 0
        self._chunk_size = chunk_size
        self._pad_id = pad_id
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._position = 0  # behind the pieces so far
        self._pieces: list[np.ndarray] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray, documents: np.ndarray) -> None:
        """Takes documents.

        Args:
            ids: int32, of one document after the other.
            lengths: int64 [documents], tokens of each.
            documents: a piece for each, see `kiem.data.documents`, without its place.
        """
        assert lengths.sum() == len(ids)
        self._waiting.append(ids)
        self._num_waiting += len(ids)
        self._place(documents, lengths)

    def take_pieces(self) -> np.ndarray:
        """Returns the pieces that the documents became since the last call, in order."""
        pieces = np.concatenate([make_pieces(position=[]), *self._pieces])
        self._pieces = []
        return pieces

    def full_chunks(self) -> np.ndarray:
        """Returns the chunks that are full, int32 [chunks, chunk_size]; the rest keeps waiting."""
        if self._num_waiting < self._chunk_size:
            return np.empty((0, self._chunk_size), dtype=np.int32)
        ids = np.concatenate(self._waiting)
        cut = len(ids) - len(ids) % self._chunk_size
        self._waiting = [ids[cut:]]
        self._num_waiting = len(ids) - cut
        return ids[:cut].reshape(-1, self._chunk_size)

    def last_chunks(self) -> np.ndarray:
        """Returns all that still waits, int32 [chunks, chunk_size]."""
        chunks = self.full_chunks()
        rest = [np.concatenate(self._waiting)] if self._num_waiting else []
        if rest:
            self._place(_PADDING, np.array([self._chunk_size - self._num_waiting]))
        self._waiting, self._num_waiting = [], 0
        return np.concatenate([chunks, self._padded(rest)])

    def _place(self, pieces: np.ndarray, lengths: np.ndarray) -> None:
        """Places pieces of these lengths one after the other behind those before."""
        pieces = pieces.copy()
        ends = self._position + np.cumsum(lengths)
        pieces["position"] = ends - lengths
        self._pieces.append(pieces[lengths > 0])
        self._position += int(lengths.sum())

    def _padded(self, rows: list[np.ndarray]) -> np.ndarray:
        """Returns each of `rows` as a chunk, filled up with padding."""
        chunks = np.full((len(rows), self._chunk_size), self._pad_id, dtype=np.int32)
        for chunk, ids in zip(chunks, rows, strict=True):
            chunk[: len(ids)] = ids
        self.num_padding_tokens += chunks.size - sum(map(len, rows))
        return chunks


class BestFitPacker(ConcatPacker):
    """Cuts documents that are longer than a chunk, and others only to keep padding small.

    What the length of a long document leaves over after whole chunks is taken from its beginning;
    so the parts after it are whole chunks, and none starts in the middle of a chunk.
    """

    def __init__(self, chunk_size: int, pad_id: int):
        super().__init__(chunk_size, pad_id)
        self._whole: list[np.ndarray] = []
        self._waiting_pieces: list[np.ndarray] = []  # of those in `_waiting`

    def add(self, ids: np.ndarray, lengths: np.ndarray, documents: np.ndarray) -> None:
        assert lengths.sum() == len(ids)
        rests = lengths % self._chunk_size
        self._waiting_pieces.append(documents[rests > 0])
        whole = documents.copy()
        whole["start"] = rests
        self._place(whole, lengths - rests)
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            rest = len(document) % self._chunk_size
            if rest:
                # A copy: a view would keep all of `ids` in memory for as long as it waits.
                self._waiting.append(document[:rest].copy())
                self._num_waiting += rest
            if rest < len(document):
                self._whole.append(document[rest:].reshape(-1, self._chunk_size).copy())

    def full_chunks(self) -> np.ndarray:
        empty = np.empty((0, self._chunk_size), dtype=np.int32)
        chunks = np.concatenate([empty, *self._whole])
        self._whole = []
        return chunks if self._num_waiting < _WINDOW_TOKENS else self._with_packed(chunks)

    def last_chunks(self) -> np.ndarray:
        return self._with_packed(self.full_chunks())

    def _with_packed(self, chunks: np.ndarray) -> np.ndarray:
        """Appends the chunks of what waits, by best-fit decreasing.

        The longest comes first, and each is put into the fullest chunk that has room for it.
        """
        plan: list[list[int]] = []  # for each chunk what is in it, by its place in `_waiting`
        # Chunks by the room that is left in them, and the rooms that occur as bits of a number.
        by_room: dict[int, list[int]] = {}
        rooms = 0
        sizes = [*map(len, self._waiting)]
        for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            fitting = rooms >> sizes[number]
            if fitting:
                room = sizes[number] + (fitting & -fitting).bit_length() - 1
                chunk = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
                plan[chunk].append(number)
            else:
                room, chunk = self._chunk_size, len(plan)
                plan.append([number])
            left = room - sizes[number]
            if left:
                by_room.setdefault(left, []).append(chunk)
                rooms |= 1 << left
        packed = self._padded(self._top_up(plan, sizes))
        self._waiting, self._num_waiting, self._waiting_pieces = [], 0, []
        return np.concatenate([chunks, packed])

    def _top_up(self, plan: list[list[int]], sizes: list[int]) -> list[np.ndarray]:
        """Returns the ids of every chunk, and places the pieces.

        Where documents fit badly, some of them are cut: those in the chunks with the most room.
        These go one after the other into full chunks instead, so that a cut one goes on at the
        start of a chunk and never behind another document.
        """
        filled = [sum(map(sizes.__getitem__, numbers)) for numbers in plan]
        by_room = sorted(range(len(plan)), key=filled.__getitem__, reverse=True)
        rooms = [self._chunk_size - filled[chunk] for chunk in by_room]
        most = _MAX_PADDING * self._num_waiting
        num_kept = int(np.searchsorted(np.cumsum(rooms), most, side="right"))
        kept = [plan[chunk] for chunk in by_room[:num_kept]]
        cut = [number for chunk in by_room[num_kept:] for number in plan[chunk]]
        # Padding is the last of the pieces here, and so has number -1.
        order: list[int] = []
        for numbers in (*kept, cut):
            order += [*numbers, -1]
        rest = -sum(map(sizes.__getitem__, cut)) % self._chunk_size
        lengths = np.array([*sizes, 0])[order]
        lengths[np.flatnonzero(np.array(order) == -1)] = [*rooms[:num_kept], rest]
        self._place(np.concatenate([*self._waiting_pieces, _PADDING])[order], lengths)
        ids = np.concatenate([np.empty(0, np.int32), *(self._waiting[number] for number in cut)])
        cuts = np.split(ids, range(self._chunk_size, len(ids), self._chunk_size))
        rows = [np.concatenate([self._waiting[number] for number in numbers]) for numbers in kept]
        return [*rows, *(cut for cut in cuts if len(cut))]


def make_packer(packing: Packing, chunk_size: int, pad_id: int) -> ConcatPacker:
    """Returns an empty packer for chunks of `chunk_size` tokens, filled up with `pad_id`."""
    return (ConcatPacker if packing == "concat" else BestFitPacker)(chunk_size, pad_id)
