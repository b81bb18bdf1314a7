"""Hashes of words and of word n-grams, with which texts are compared."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable

import numpy as np

from kiem.data.clean.tokens import word_signs

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class WordHashes(dict[str, int]):
    """64-bit hashes of words, each computed once; unlike Python's, the same on every machine."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        self[word] = number = int.from_bytes(digest, "big")
        return number

    def of_text(self, text: str) -> np.ndarray:
        """Returns the hash of every word, uint64 [words]; a text without words counts as one."""
        words = lowercase_words(text) or [text]
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def lowercase_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation and invisible joiners."""
    return _word_finder()(text.lower().replace("\u200c", "").replace("\u200d", ""))


@functools.cache
def _word_finder() -> Callable[[str], list[str]]:
    # Thai, Lao, Burmese and Khmer have no spaces between words, so a word would be a phrase, and
    # few n-grams would be left. Between their signs are pieces that are about as long as a word.
    signs = re.sub("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]", "", word_signs())
    return re.compile(rf"[\w{signs}]+").findall


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hash of every n-gram: words, uint64 [words] -> uint64 [max(0, words - n + 1)]."""
    num_ngrams = max(0, len(hashes) - n + 1)
    mixed = np.zeros(num_ngrams, np.uint64)
    for start in range(n):
        mixed = mix_hashes(mixed, hashes[start : start + num_ngrams])
    return mixed


def mix_hashes(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Combines pairs of hashes into one each, uint64 [n]; their order matters."""
    mixed = (hashes ^ others) * _MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


def group_equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first position and the count of every different key, in the order of the keys.

    It is `np.unique` with an index and counts, but several times as fast.
    """
    order = np.argsort(keys)  # not stable; the smallest position of a group is the first anyway
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[len(keys) > 0], ordered[1:] != ordered[:-1]]))
    return np.minimum.reduceat(order, starts), np.diff(starts, append=len(keys))


def duplicated(keys: np.ndarray) -> np.ndarray:
    """Returns which keys equal an earlier one: uint64 [n] -> bool [n]."""
    mask = np.ones(len(keys), bool)
    mask[group_equal(keys)[0]] = False
    return mask


def repeated(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the keys that occur more than once, where most do not: uint64 [n].

    Returns:
        Their positions, in order, and for each a number from 0 that equal keys share.
    """
    # Sorting takes most time. So keys are counted by some of their bits first, which tells nearly
    # all of those that occur once.
    bits = max(1, (4 * len(keys)).bit_length())
    cells = (keys * _MULTIPLIER >> np.uint64(64 - bits)).astype(np.int64)
    places = np.flatnonzero(np.bincount(cells)[cells] > 1)
    _, groups, counts = np.unique(keys[places], return_inverse=True, return_counts=True)
    is_repeated = counts[groups] > 1
    numbers = np.cumsum(counts > 1) - 1
    return places[is_repeated], numbers[groups[is_repeated]]
