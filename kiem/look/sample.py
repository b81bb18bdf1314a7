"""Parts of a chunk directory, chosen by a seed so that any size is looked at within seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kiem.core.randomness import derive_seed
from kiem.data.chunks import NO_SOURCE, open_split
from kiem.data.documents import Documents, open_verified_documents

_MOST_TOKENS = 1 << 22
_MOST_BATCHES = 16  # of the record of documents, about a million of them
_MOST_DOCUMENTS = 1000
_MOST_DOCUMENT_TOKENS = 256


@dataclass(frozen=True)
class Sampled:
    """What was looked at, of the training split.

    Attributes:
        chunks: int32 [chunks, chunk_size].
        num_chunks: how many there are to choose from.
    """

    chunks: np.ndarray
    num_chunks: int

    @property
    def is_all(self) -> bool:
        """Whether that is everything."""
        return len(self.chunks) == self.num_chunks


@dataclass(frozen=True)
class SampledDocuments:
    """Documents that were looked at, of the training split.

    Attributes:
        lengths: tokens of each, int64 [documents].
        is_all: whether these are all.
        begins: int32 ids of the beginnings of some of them, in an order by chance.
        places: file and row of these.
        labels: their sources, by number.
    """

    lengths: np.ndarray
    is_all: bool
    begins: list[np.ndarray]
    places: list[tuple[int, int]]
    labels: list[int]


def sample_chunks(path: Path, manifest: dict[str, Any], seed: int) -> Sampled:
    """Returns some chunks, or all."""
    chunks = open_split(path, manifest, "train")
    most = max(1, _MOST_TOKENS // chunks.chunk_size)
    numbers = _some(chunks.num_chunks, most, seed, "chunks")
    return Sampled(chunks.read(np.sort(numbers)), chunks.num_chunks)


def sample_documents(path: Path, manifest: dict[str, Any], seed: int) -> SampledDocuments:
    """Returns some documents, or all; raises a UserError if their record is damaged."""
    documents = open_verified_documents(path, manifest, "train")
    batches = np.sort(_some(len(documents.columns), _MOST_BATCHES, seed, "batches"))
    pieces = [_with_lengths(documents, batch) for batch in batches.tolist()]
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    is_text = columns["file"] != NO_SOURCE
    columns = {name: column[is_text] for name, column in columns.items()}
    # Best-fit cuts documents into pieces that stand anywhere.
    order = np.lexsort((columns["start"], columns["row"], columns["file"]))
    file, row = columns["file"][order], columns["row"][order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (file[1:] != file[:-1]) | (row[1:] != row[:-1])
    firsts = np.flatnonzero(is_first)
    lengths = np.add.reduceat(columns["length"][order], firsts) if len(firsts) else firsts
    whole = order[firsts]
    beginning = np.flatnonzero(columns["start"][whole] == 0)
    chosen = beginning[_some(len(beginning), _MOST_DOCUMENTS, seed, "documents")]
    chunks = open_split(path, manifest, "train")
    places = whole[chosen]
    return SampledDocuments(
        lengths=lengths,
        is_all=len(batches) == len(documents.columns),
        begins=[
            _read(chunks, int(columns["position"][place]), int(columns["length"][place]))
            for place in places
        ],
        places=[(int(columns["file"][place]), int(columns["row"][place])) for place in places],
        labels=columns["source"][places].tolist(),
    )


def _with_lengths(documents: Documents, batch: int) -> dict[str, np.ndarray]:
    """Returns the columns of a batch of pieces, and their lengths."""
    columns = documents.columns[batch]
    is_last = batch + 1 == len(documents.columns)
    end = (
        documents.num_chunks * documents.chunk_size
        if is_last
        else documents.columns[batch + 1]["position"][0]
    )
    return {**columns, "length": np.diff(columns["position"], append=end)}


def _read(chunks: Any, position: int, length: int) -> np.ndarray:
    """Returns the first ids of a piece."""
    end = position + min(length, _MOST_DOCUMENT_TOKENS)
    numbers = np.arange(position // chunks.chunk_size, -(-end // chunks.chunk_size))
    start = position - int(numbers[0]) * chunks.chunk_size
    return chunks.read(numbers).reshape(-1)[start : start + end - position]


def _some(count: int, most: int, seed: int, purpose: str) -> np.ndarray:
    """Returns numbers below `count`, in an order by chance: all, or `most` of them."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, f"look {purpose}")))
    return generator.choice(count, min(count, most), replace=False, shuffle=True)
