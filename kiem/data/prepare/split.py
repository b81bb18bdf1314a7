"""The test split: which documents belong to it, and where a document is cut for it.

Documents go to the test split by a hash of their text. Where they are so few and large that this
would take far more text than asked for, or leave too little to train on, the end of one of them is
cut off for testing instead. This depends on the documents alone, not on the workers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Decisions about documents. The end of a CUT one is for testing, the rest for training.
TRAIN, TEST, CUT = range(3)

# More than the text of a token takes, so that this many bytes per token fill a chunk.
_BYTES_PER_TOKEN = 6
# The share of the other text that testing may take as well, to keep documents whole.
_MAX_EXCESS = 0.1
# Where a document may be cut, best first. White space stays before the cut.
_BORDERS = {
    "paragraph": re.compile(r"\n[^\S\n]*\n\s*"),
    "line": re.compile(r"\n\s*"),
    "sentence": re.compile(r"[.!?…][\"'’”»)\]]*\s+"),
    "word": re.compile(r"\s+"),
}


class Split(NamedTuple):
    """Where the test split ends.

    Attributes:
        limit: documents with a lower position are for testing.
        cut_bytes: of documents with just this position, about so many bytes at the end are for
            testing as well; None: no document is cut.
    """

    limit: int
    cut_bytes: int | None = None


class Border(NamedTuple):
    """Where a document is cut.

    Attributes:
        place: the first character that is for testing.
        kind: what ends there, "paragraph", "line", "sentence", "word" or "character".
    """

    place: int
    kind: str


def split_position(text: str, seed: int) -> int:
    """Returns a document's position in the split, in [0, 2**64): a hash of `seed` and its text."""
    digest = hashlib.sha256(f"{seed}/".encode() + text.encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split_limit(test_share: float, lowest_position: int) -> int:
    """Returns the position below which documents are for testing; there always is one."""
    return max(int(test_share * 2**64), lowest_position + 1)


def decide_split(
    documents: Iterable[Sequence[np.ndarray]], test_share: float, chunk_size: int
) -> Split:
    """Decides which documents are for testing, and whether one of them is cut.

    None is cut if whole documents leave a chunk to train on, and take hardly more text for testing
    than was asked for, or not more than a chunk. Otherwise documents are taken in the order of
    their positions until the test split has what was asked for, but at least a chunk (or half of
    the text, if that is less): the one that is too much is cut.

    Args:
        documents: the positions, uint64, and bytes, int64, of some documents at a time. Only those
            that may be for testing are kept in memory.
        test_share: share of the documents for testing, in (0, 1).
        chunk_size: tokens in a chunk.
    """
    parts = [(np.empty(0, np.uint64), np.empty(0, np.int64))]
    total, lowest = 0, 2**64
    for positions, num_bytes in documents:
        if len(positions) == 0:
            continue
        total += int(num_bytes.sum())
        lowest = min(lowest, int(positions.min()))
        may_test = positions <= np.uint64(max(int(test_share * 2**64), lowest))
        parts.append((positions[may_test], num_bytes[may_test]))
    if lowest == 2**64:
        return Split(0)
    positions, num_bytes = map(np.concatenate, zip(*parts, strict=True))
    by_documents = Split(min(split_limit(test_share, lowest), 2**64 - 1))
    is_test = positions < np.uint64(by_documents.limit)
    num_test = int(num_bytes[is_test].sum())
    enough = _BYTES_PER_TOKEN * chunk_size
    most = max(enough, int((test_share + _MAX_EXCESS * (1 - test_share)) * total))
    if num_test <= most and total - num_test >= enough:
        return by_documents
    wanted = max(int(test_share * total), min(enough, total // 2))
    # Equal documents have equal positions. Each of them is cut at the same place.
    different, which = np.unique(positions[is_test], return_inverse=True)
    sizes = np.zeros(len(different), np.int64)
    np.add.at(sizes, which, num_bytes[is_test])
    ends = np.cumsum(sizes)
    too_much = int(np.searchsorted(ends, wanted, side="right"))
    if too_much == len(different):
        return by_documents
    num_before = int(ends[too_much] - sizes[too_much])
    limit = int(different[too_much])
    if 2 * num_before >= wanted:
        return Split(limit)
    num_copies = int(np.count_nonzero(which == too_much))
    return Split(limit, max(1, (wanted - num_before) // num_copies))


def find_border(text: str, num_bytes: int) -> Border | None:
    """Returns where to cut a document so that about `num_bytes` bytes of UTF-8 are behind the cut.

    That is the end of a paragraph, if there is one within half of that; otherwise of a line, a
    sentence or a word, and without any space, a place between two characters. Both sides have text:
    None if the document has fewer than two characters that are not white space.
    """
    first, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if end - first < 2:
        return None
    # The last characters that make `num_bytes` bytes.
    tail = text[max(first, end - num_bytes) : end].encode()
    wanted = end - len(tail[-num_bytes:].decode(errors="ignore"))
    wanted = min(max(wanted, first + 1), end - 1)
    slack = (end - wanted) // 2
    low, high = max(first + 1, wanted - slack), min(end - 1, wanted + slack)
    window = text[low - 1 : high]
    for kind, border in _BORDERS.items():
        ends = [low - 1 + found.end() for found in border.finditer(window)]
        if places := [place for place in ends if not text[place].isspace()]:
            return Border(min(places, key=lambda place: abs(place - wanted)), kind)
    return Border(wanted, "character")
