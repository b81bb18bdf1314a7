"""The documents that a vocabulary is trained on: those of the training split."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from kiem.data.cleaning import Cleaning
from kiem.data.sources import count_words
from kiem.data.split import decide_split, find_border, split_position
from kiem.data.units import Reading, Unit, read_unit_rows, row_batches
from kiem.data.words import WordHashes


class TrainingTexts:
    """Reads the training documents from the source, each time that it is iterated over.

    Equal documents come each time they are there, and near duplicates too.

    Args:
        units: the plan.
        reading: how the source is read.
        cleaning: what is mended and left out.
        word_limit: documents are taken as long as they have no more words together.
        test_share: share of the documents for testing.
        seed: of the split.
        chunk_size: tokens in a chunk.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        reading: Reading,
        cleaning: Cleaning,
        word_limit: int | None,
        test_share: float,
        seed: int,
        chunk_size: int,
    ):
        self._units = units
        self._reading = reading
        self._cleaning = cleaning
        self._positions, self._is_kept, num_bytes = self._read_first(word_limit, seed)
        firsts = np.arange(len(self._positions))
        if cleaning.filters != "none":
            firsts = np.unique(self._positions, return_index=True)[1]
        self._split = decide_split(
            self._positions[firsts], num_bytes[firsts], test_share, chunk_size
        )

    def __iter__(self) -> Iterator[str]:
        positions = iter(self._positions.tolist())
        rows = (row for unit in self._units for _, row in read_unit_rows(unit, self._reading))
        limit, cut_bytes = self._split
        for is_kept, row in zip(self._is_kept, rows, strict=False):
            if not is_kept or (position := next(positions)) < limit:
                continue
            text = self._cleaning.mend(row.text or "")
            if position > limit or cut_bytes is None:
                yield text
            elif (border := find_border(text, cut_bytes)) is not None:
                yield text[: border.place]

    def _read_first(
        self, word_limit: int | None, seed: int
    ) -> tuple[np.ndarray, bytearray, np.ndarray]:
        """Returns the documents' positions, which rows they are, and their bytes."""
        positions, num_bytes, is_kept = array("Q"), array("q"), bytearray()
        num_words = 0
        for unit in self._units:
            hashes = WordHashes()
            for rows in row_batches(read_unit_rows(unit, self._reading)):
                for text, reason in self._cleaning.clean([row for _, row in rows], hashes):
                    if text is None or reason is not None:
                        is_kept.append(False)
                        continue
                    if word_limit is not None:
                        num_words += count_words(text)
                        if num_words > word_limit:
                            return np.array(positions), is_kept, np.array(num_bytes)
                    is_kept.append(True)
                    positions.append(split_position(text, seed))
                    num_bytes.append(len(text.encode()))
        return np.array(positions), is_kept, np.array(num_bytes)
