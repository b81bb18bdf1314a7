"""The documents that a vocabulary is trained on: those of the training split."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from kiem.data.clean.cleaner import Cleaning
from kiem.data.clean.near_duplicates import NUM_BANDS, band_keys
from kiem.data.clean.ngrams import WordHashes, duplicated
from kiem.data.prepare.split import decide_split, find_border, split_position
from kiem.data.prepare.units import Reading, Unit, read_unit_rows, row_batches
from kiem.data.read.sources import count_words


class TrainingTexts:
    """Reads the training documents from the source, each time that it is iterated over.

    Equal documents come each time they are there, and near duplicates too.

    Args:
        units: the plan.
        reading: how the source is read.
        cleaning: what is normalized and rejected.
        word_limit: documents are taken as long as they have no more words together.
        test_share: share of the documents for testing.
        seed: of the split.
        chunk_size: tokens in a chunk.

    Attributes:
        rejected: rows that are left out, by reason; likeness is none of the reasons.
        words_next: of the first document beyond the word limit; 0 if there is none.
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
        self._is_kept = bytearray()  # of every row
        self.rejected: Counter[str] = Counter()
        self.words_next = 0
        positions, num_bytes, keys = array("Q"), array("q"), [np.empty((0, NUM_BANDS), np.uint64)]
        for texts, hashes in self._read_first(word_limit):
            positions.extend(split_position(text, seed) for text in texts)
            num_bytes.extend(len(text.encode()) for text in texts)
            if cleaning.near_duplicates:
                keys.append(band_keys(texts, hashes))
        self._positions = np.array(positions)
        # The split is that of the documents that are like no earlier one, as for the chunks.
        places = np.arange(len(positions))
        if cleaning.filters != "none":
            places = places[~duplicated(self._positions)]
        if cleaning.near_duplicates:
            bands = np.concatenate(keys)[places].T
            places = places[~np.any([duplicated(band) for band in bands], axis=0)]
        self._split = decide_split(
            self._positions[places], np.array(num_bytes)[places], test_share, chunk_size
        )

    def __iter__(self) -> Iterator[str]:
        positions = iter(self._positions.tolist())
        rows = (row for unit in self._units for _, row in read_unit_rows(unit, self._reading))
        limit, cut_bytes = self._split
        for is_kept, row in zip(self._is_kept, rows, strict=False):
            if not is_kept or (position := next(positions)) < limit:
                continue
            text = self._cleaning.normalize(row.text)
            if position > limit or cut_bytes is None:
                yield text
            elif (border := find_border(text, cut_bytes)) is not None:
                yield text[: border.place]

    def _read_first(self, word_limit: int | None) -> Iterator[tuple[list[str], WordHashes]]:
        """Yields batches of the documents, and says of every row whether it is one."""
        num_words = 0
        for unit in self._units:
            hashes = WordHashes()
            for rows in row_batches(read_unit_rows(unit, self._reading)):
                taken: list[str] = []
                for text, reason in self._cleaning.clean([row for _, row in rows], hashes):
                    is_kept = reason is None
                    if reason is not None:
                        self.rejected[reason] += 1
                    if is_kept:
                        words = count_words(text)
                        num_words += words
                        if word_limit is not None and num_words > word_limit:
                            self.words_next = words
                            yield taken, hashes
                            return
                        taken.append(text)
                    self._is_kept.append(is_kept)
                yield taken, hashes
