"""Keys under which documents that are nearly the same meet: MinHash with bands (needs rensa).

Shingles of 5 words and 14 bands of 8 values are FineWeb-2's (fineweb-2-pipeline.py): two
documents with a Jaccard similarity s of their shingles share a key with probability
1 - (1 - s^8)^14, which is 0.05 at s = 0.5, 0.56 at 0.7, 0.77 at 0.75, 0.92 at 0.8 and 1.0 at 0.9.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kiem.core.errors import not_installed
from kiem.data.clean.words import WordHashes, hash_ngrams, mix_hashes, plain_words

SHINGLE_WORDS = 5
NUM_BANDS = 14
_BAND_VALUES = 8
_SEED = 42  # of the permutations; any will do, but the same for all documents


def require_rensa() -> None:
    """Raises a UserError if rensa is not installed."""
    try:
        import rensa  # noqa: F401
    except ImportError as error:
        raise not_installed("rensa", "--near-duplicates") from error


def band_names() -> list[str]:
    """Returns the names of a unit file's columns of keys, one a band."""
    return [f"band_{band}" for band in range(NUM_BANDS)]


def band_keys(texts: Sequence[str], hashes: WordHashes) -> np.ndarray:
    """Returns the keys of documents: two are near duplicates when they share one in some band.

    Args:
        texts: the documents.
        hashes: keeps the hashes of words that it saw before.

    Returns:
        uint64 [documents, NUM_BANDS].
    """
    from rensa import RMinHash

    if not texts:
        return np.empty((0, NUM_BANDS), np.uint64)
    shingles = [shingle_hashes(text, hashes) for text in texts]
    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    num_values = NUM_BANDS * _BAND_VALUES
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), offsets, num_values, _SEED
    )
    values = np.array(matrix.to_rows(), np.uint64).reshape(-1, _BAND_VALUES)
    keys = np.zeros(len(values), np.uint64)
    for column in values.T:
        keys = mix_hashes(keys, column)
    return keys.reshape(len(texts), NUM_BANDS)


def shingle_hashes(text: str, hashes: WordHashes) -> np.ndarray:
    """Returns the different shingles of a document, uint64; a shorter document is one shingle."""
    words = hashes.of(plain_words(text) or [text])
    return np.unique(hash_ngrams(words, min(SHINGLE_WORDS, len(words))))
