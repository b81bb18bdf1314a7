"""Which documents are for training and which for testing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

from kiem.data.sources import Document

Split = Literal["train", "test"]


def split_documents(
    documents: Iterable[Document], test_share: float, seed: int
) -> Iterator[tuple[Split, Document]]:
    """Assigns every document to train or test by a hash of its text, so equal texts stay together.

    If no hash falls below `test_share`, the text with the lowest hash becomes the test split: there
    is always a test document. Until the first test document appears, the one with the lowest hash
    so far is held back for that.

    Args:
        documents: the documents in order.
        test_share: share of the documents for testing, in (0, 1).
        seed: another seed gives another split.

    Yields:
        The split and the document, each document once.
    """
    held: list[Document] = []
    lowest = float("inf")
    any_test = False
    for document in documents:
        digest = hashlib.sha256(f"{seed}/".encode() + document.text.encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        if position < test_share:
            any_test = True
            for other in held:
                yield "train", other
            held = []
            yield "test", document
        elif any_test or position > lowest:
            yield "train", document
        elif position == lowest:
            held.append(document)
        else:
            for other in held:
                yield "train", other
            held, lowest = [document], position
    for other in held:
        yield "test", other
