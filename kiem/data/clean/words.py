"""Words as 64-bit hashes, and hashes of word n-grams, for what compares texts word by word."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORDS = re.compile(r"\w+")


class WordHashes(dict[str, int]):
    """Hashes each different word once; the same on every machine, unlike Python's own hash."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        self[word] = number = int.from_bytes(digest, "big")
        return number

    def of(self, words: Sequence[str]) -> np.ndarray:
        """Returns the hash of every word, uint64 [words]."""
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def plain_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, punctuation left out."""
    return _WORDS.findall(text.lower())


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hash of every n consecutive words.

    Args:
        hashes: of the words, uint64 [words].
        n: words in an n-gram.

    Returns:
        uint64 [max(0, words - n + 1)].
    """
    num_ngrams = max(0, len(hashes) - n + 1)
    mixed = np.zeros(num_ngrams, np.uint64)
    for start in range(n):
        mixed = mix_hashes(mixed, hashes[start : start + num_ngrams])
    return mixed


def mix_hashes(before: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Returns hashes of sequences that go on with one more hash each, uint64 [sequences]."""
    mixed = (before ^ hashes) * _MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


def group_equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first place of every different key, and how often the key occurs.

    Args:
        keys: uint64 [n].

    Returns:
        Two int64 arrays [different], in the order of the keys.
    """
    if len(keys) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    # Not a stable sort, which takes several times as long; the smallest place is the first anyway.
    order = np.argsort(keys)
    ordered = keys[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return np.minimum.reduceat(order, begins), np.diff(begins, append=len(keys))


def came_before(keys: np.ndarray) -> np.ndarray:
    """Returns which keys equal an earlier one: uint64 [n] -> bool [n]."""
    is_again = np.ones(len(keys), bool)
    is_again[group_equal(keys)[0]] = False
    return is_again
