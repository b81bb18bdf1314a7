"""MinHash bands with which near-duplicate documents are found (needs rensa).

Shingles of 5 words and 14 bands of 8 values are FineWeb-2's (fineweb-2-pipeline.py): two
documents whose shingles have a Jaccard similarity s share a band with probability
1 - (1 - s^8)^14, which is 0.05 at s = 0.5, 0.56 at 0.7, 0.77 at 0.75, 0.92 at 0.8 and 1.0 at 0.9.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kiem.data.clean.ngrams import WordHashes, hash_ngrams, mix_hashes

SHINGLE_WORDS = 5
NUM_BANDS = 14
_BAND_VALUES = 8
_SEED = 42  # of the permutations, the same for all documents


def band_names() -> list[str]:
    """Returns the names of a unit file's columns of band keys."""
    return [f"band_{band}" for band in range(NUM_BANDS)]


def band_keys(texts: Sequence[str], hashes: WordHashes) -> np.ndarray:
    """Returns a key for each band, uint64 [documents, NUM_BANDS].

    Two documents are near duplicates if they have the same key in some band.
    """
    from rensa import RMinHash

    shingles = [_shingles(text, hashes) for text in texts]
    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), offsets, NUM_BANDS * _BAND_VALUES, _SEED
    )
    values = np.array(matrix.to_rows(), np.uint64).reshape(-1, _BAND_VALUES)
    keys = np.zeros(len(values), np.uint64)
    for column in values.T:
        keys = mix_hashes(keys, column)
    return keys.reshape(len(texts), NUM_BANDS)


def _shingles(text: str, hashes: WordHashes) -> np.ndarray:
    """Returns hashes of a document's different shingles; a shorter document is one shingle."""
    words = hashes.of_text(text)
    return np.unique(hash_ngrams(words, min(SHINGLE_WORDS, len(words))))
