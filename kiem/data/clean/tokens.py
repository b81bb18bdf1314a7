"""The words and punctuation marks of many documents, numbered."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, count

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Tokens:
    """The words and punctuation marks of some documents, numbered.

    Attributes:
        vocabulary: the different tokens, in the order of their ids.
        ids: int64 [T].
        document: which document a token is in, int64 [T].
        starts: each document's first token, then T, int64 [D + 1].
        offsets: characters in the tokens before each one, then in all, int64 [T + 1].
        num_tokens, num_characters: of each document, int64 [D].
    """

    def __init__(self, texts: Sequence[str]):
        # No token goes across white space: what is between it is numbered, and each different one
        # is cut into tokens once. Arrow's white space is Python's; beside it there are empty words.
        texts_utf8 = [text.encode(errors="replace") for text in texts]
        split = pc.utf8_split_whitespace(pa.array(texts_utf8, pa.large_string()))
        words = split.flatten().dictionary_encode()
        word_ids = words.indices.to_numpy()
        # One line for each word. The end of a line is numbered, too: as 0, before all tokens.
        numbers: defaultdict[str, int] = defaultdict(count(1).__next__, {"\n": 0})
        lines = "".join(f"{word}\n" for word in words.dictionary.to_pylist())
        flat = np.fromiter(map(numbers.__getitem__, _token_finder()(lines)), np.int64)
        ends_of_lines = np.flatnonzero(flat == 0)
        lengths = np.diff(ends_of_lines, prepend=-1) - 1  # tokens of each different word
        flat = np.delete(flat, ends_of_lines) - 1
        # Put the tokens of each word where it occurs.
        num_tokens = lengths[word_ids]
        ends = np.concatenate([[0], np.cumsum(num_tokens)])
        shifts = (np.cumsum(lengths) - lengths)[word_ids] - ends[:-1]
        self.ids = flat[np.repeat(shifts, num_tokens) + np.arange(ends[-1])]
        self.vocabulary = list(numbers)[1:]
        self.starts = ends[split.offsets.to_numpy()]
        self.num_tokens = np.diff(self.starts)
        self.document = np.repeat(np.arange(len(texts)), self.num_tokens)
        sizes = np.fromiter(map(len, self.vocabulary), np.int64)[self.ids]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.num_characters = np.array([len(text) for text in texts], np.int64)

    def count(self, of_vocabulary: np.ndarray) -> np.ndarray:
        """Returns the sum over each document's tokens of a value that tokens have: [V] -> [D]."""
        return self.total(of_vocabulary[self.ids])

    def total(self, values: np.ndarray) -> np.ndarray:
        """Returns the sum over each document's tokens: [T] -> int64 [D]."""
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(sums[self.starts])


@functools.cache
def word_signs() -> str:
    """Returns the characters that are part of a word but not in \\w: accents that have no letter of
    their own with them, and vowel signs of Indic and other scripts."""
    candidates = map(chr, chain(range(0x300, 0x1E00), range(0xA000, 0xAC00)))
    return "".join(c for c in candidates if unicodedata.category(c).startswith("M"))


@functools.cache
def _token_finder() -> Callable[[str], list[str]]:
    """Returns a function that cuts text into words, marks and the ends of lines."""
    word = rf"[\w{word_signs()}]+"
    # Two invisible characters join or separate the letters of one word.
    return re.compile(rf"'n\b|{word}(?:['’.\-\u200c\u200d]{word})*|[^\w\s]+|\n").findall
