"""Packing of documents into chunks of exactly chunk_size tokens; no token is lost.

concat: one document after the other, cut every chunk_size tokens. best-fit: as few documents as
possible are cut (Ding et al. 2024, Fewer Truncations Improve Language Modeling,
https://arxiv.org/abs/2404.10830): a long document fills whole chunks, and what is left of it is put
where it fits best. Padding fills the ends of chunks and is never trained on: text never becomes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from kiem.config import PreprocessOptions
from kiem.data.arrow import to_numpy
from kiem.data.chunks import NO_SOURCE, TEST_SOURCES, SplitWriter
from kiem.data.prepare.split import TEST, TRAIN
from kiem.tokenizer.encoding import Encoded
from kiem.tokenizer.tokenizer import Tokenizer

# Documents that best-fit has to choose from. More choice leaves less padding and takes memory.
_WINDOW_TOKENS = 1 << 24
# The share of padding above which best-fit rather cuts documents.
_MAX_PADDING = 0.005

Packing = Literal["concat", "best-fit"]
# Record batches of a unit file, the names that their `source` column numbers, and the decisions
# about all their rows.
UnitDocuments = tuple[list[pa.RecordBatch], list[str], np.ndarray]


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

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Takes the int32 ids of documents, one after the other, and the length of each."""
        assert lengths.sum() == len(ids)
        self._waiting.append(ids)
        self._num_waiting += len(ids)

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
        self._waiting, self._num_waiting = [], 0
        return np.concatenate([chunks, self._padded(rest)])

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

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        assert lengths.sum() == len(ids)
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
        plan: list[list[np.ndarray]] = []
        # Chunks by the room that is left in them, and the rooms that occur as bits of a number.
        by_room: dict[int, list[int]] = {}
        rooms = 0
        for ids in sorted(self._waiting, key=len, reverse=True):
            fitting = rooms >> len(ids)
            if fitting:
                room = len(ids) + (fitting & -fitting).bit_length() - 1
                chunk = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
                plan[chunk].append(ids)
            else:
                room, chunk = self._chunk_size, len(plan)
                plan.append([ids])
            left = room - len(ids)
            if left:
                by_room.setdefault(left, []).append(chunk)
                rooms |= 1 << left
        rows = [np.concatenate(fitted) for fitted in plan]
        packed = self._padded(self._top_up(rows))
        self._waiting, self._num_waiting = [], 0
        return np.concatenate([chunks, packed])

    def _top_up(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        """Where documents fit badly, cuts some of them: those in the chunks with the most room.

        These go one after the other into full chunks instead, so that a cut one goes on at the
        start of a chunk and never behind another document.
        """
        by_room = sorted(rows, key=len, reverse=True)
        rooms = np.cumsum([self._chunk_size - len(ids) for ids in by_room])
        num_kept = int(np.searchsorted(rooms, _MAX_PADDING * self._num_waiting, side="right"))
        ids = np.concatenate([np.empty(0, np.int32), *by_room[num_kept:]])
        cuts = np.split(ids, range(self._chunk_size, len(ids), self._chunk_size))
        return [*by_room[:num_kept], *(cut for cut in cuts if len(cut))]


def make_packer(packing: Packing, chunk_size: int, pad_id: int) -> ConcatPacker:
    """Returns an empty packer for chunks of `chunk_size` tokens, filled up with `pad_id`."""
    return (ConcatPacker if packing == "concat" else BestFitPacker)(chunk_size, pad_id)


class _SplitPacker:
    """Packs the documents of one split into shards, and counts them by source."""

    def __init__(self, folder: Path, options: PreprocessOptions, pad_id: int, column: str):
        self._chunk_size = options.chunk_size
        self._packer = make_packer(options.packing, options.chunk_size, pad_id)
        self._writer = SplitWriter(folder, options.chunk_size, column)
        self._counts = {n: Counter[str]() for n in ("documents", "words", "bytes", "tokens")}

    def add(self, ids: np.ndarray, counted: dict[str, np.ndarray], names: list[str]) -> None:
        """Takes the ids of documents, what is counted of each, and the names of their sources."""
        self._packer.add(ids, counted["tokens"])
        self._writer.write(self._packer.full_chunks())
        for name, counts in self._counts.items():
            sums = np.bincount(counted["source"], counted[name], len(names))
            counts.update(dict(zip(names, sums.astype(int).tolist(), strict=True)))

    def close(self) -> dict[str, Any]:
        """Writes what still waits and returns the manifest's entry of the split."""
        self._writer.write(self._packer.last_chunks())
        shards = self._writer.close()
        totals = {name: counts.total() for name, counts in self._counts.items()}
        num_chunks = sum(shard["chunks"] for shard in shards)
        num_padding = num_chunks * self._chunk_size - totals["tokens"]
        assert num_padding == self._packer.num_padding_tokens, "tokens were lost"
        per_source = {name: +self._counts[name] for name in ("documents", "tokens", "bytes")}
        return {
            **totals,
            "chunks": num_chunks,
            "padding_tokens": num_padding,
            **{f"{n}_per_source": dict(sorted(c.items())) for n, c in per_source.items()},
            "shards": shards,
        }


def write_splits(
    documents: Iterable[UnitDocuments],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    folder: Path,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Packs the documents into chunks and writes both splits.

    Args:
        documents: of all units; those that are TRAIN or TEST are written.
        tokenizer: the one that made the ids.
        options: with the size of chunks and the way of packing.
        folder: the unfinished chunk directory.

    Returns:
        The manifest's entry of each split, and how many rows of the vocabulary no token has.
    """
    splits = {
        code: _SplitPacker(folder / name, options, tokenizer.pad_id, "input_ids")
        for name, code in (("train", TRAIN), ("test", TEST))
    }
    # Packed as the test tokens are: for each token, the number of its document's source.
    sources = _SplitPacker(folder / TEST_SOURCES, options, NO_SOURCE, "source")
    numbers: dict[str, int] = {}
    is_used = np.zeros(tokenizer.num_rows, dtype=bool)
    for batches, names, codes in documents:
        start = 0
        for batch in batches:
            here = codes[start : start + batch.num_rows]
            start += batch.num_rows
            for code, split in splits.items():
                chosen = here == code
                if not chosen.any():
                    continue
                ids, counted = _chosen(batch, chosen)
                is_used[ids] = True
                split.add(ids, counted, names)
                if code == TEST:
                    labels = [names[n] for n in counted["source"].tolist()]
                    of_rows = [numbers.setdefault(label, len(numbers)) for label in labels]
                    of_ids = np.repeat(np.array(of_rows, np.int32), counted["tokens"])
                    sources.add(of_ids, counted, names)
    train, test = splits[TRAIN].close(), splits[TEST].close()
    test["source_names"], test["source_shards"] = list(numbers), sources.close()["shards"]
    return {"train": train, "test": test}, int(tokenizer.num_rows - is_used.sum())


def _chosen(batch: pa.RecordBatch, chosen: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the ids of the chosen rows, one after the other, and what is counted of each."""
    column = batch.column("ids")
    lengths, ids = np.diff(to_numpy(column.offsets)), to_numpy(column.values)
    if not chosen.all():
        ids = ids[np.repeat(chosen, lengths)]
    counted = {name: to_numpy(batch.column(name))[chosen] for name in ("source", "words", "bytes")}
    tokens = lengths[chosen]
    return ids, {**counted, "tokens": tokens, "documents": np.ones_like(tokens)}
