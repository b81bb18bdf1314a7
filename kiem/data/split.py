"""Which documents are for training and which for testing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator


def split_position(text: str, seed: int) -> int:
    """Returns a document's place in the split, by a hash of its text: equal texts stay together.

    Args:
        text: the document.
        seed: another seed gives another split.

    Returns:
        A number in [0, 2**64). Those below `test_share` of that are for testing.
    """
    digest = hashlib.sha256(f"{seed}/".encode() + text.encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split_limit(test_share: float, lowest_position: int) -> int:
    """Returns the position below which documents are for testing, so that there always is one.

    Args:
        test_share: share of the documents for testing, in (0, 1).
        lowest_position: the lowest position of all documents; if none falls into the share, the
            text with this one becomes the test split.
    """
    return max(int(test_share * 2**64), lowest_position + 1)


def training_texts(texts: Iterable[str], test_share: float, seed: int) -> Iterator[str]:
    """Yields the texts of the training split, before all of them have been seen.

    Until the first text of the test share appears, the one with the lowest position so far is held
    back: it may be all there is to test on.
    """
    share = split_limit(test_share, -1)
    held: list[str] = []
    lowest = 2**64
    for text in texts:
        position = split_position(text, seed)
        if position < share or position < lowest:
            if lowest >= share:
                yield from held
            held = [text]
            lowest = min(lowest, position)
        elif position == lowest:
            held.append(text)
        else:
            yield text
