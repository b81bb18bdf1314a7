"""Bits per byte of whole documents, which compares models across tokenizers.

bits per byte = nats of all tokens of the text / (ln 2 x UTF-8 bytes of the original text)

Every document is read from its beginning, after <bos>. A document longer than the context is read
in overlapping windows. Each window begins with <bos>, without which Gemma models go astray, and
half of it is text that was scored before. So every token is scored once, with at least half a
context before it where the document has that much. <eos> is neither given nor scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from kiem.core.randomness import derive_seed
from kiem.data.read.rows import Document
from kiem.evaluation.language_model import LanguageModel, text_nats

_RESAMPLES = 1000
_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Measured:
    """Measurements of each document; num_unknown is over all."""

    nats: np.ndarray  # fp64 [documents]
    num_bytes: np.ndarray  # int64 [documents]
    num_tokens: np.ndarray  # int64 [documents], without <bos>
    sources: list[str]
    num_unknown: int  # tokens that stand for text the tokenizer cannot express


def measure(model: LanguageModel, documents: Iterator[Document]) -> Measured:
    """Scores every token of the documents once."""
    nats, sources, num_unknown = [np.zeros(0)], [], 0
    num_bytes: list[int] = []
    num_tokens: list[int] = []
    while block := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        encoded = model.encode([document.text for document in block])
        nats.append(text_nats(model, encoded))
        num_bytes += [len(document.text.encode()) for document in block]
        num_tokens += map(len, encoded)
        if model.unknown_id is not None:
            num_unknown += sum(ids.count(model.unknown_id) for ids in encoded)
        sources += [document.source for document in block]
    sizes = np.array(num_bytes), np.array(num_tokens)
    return Measured(np.concatenate(nats), *sizes, sources, num_unknown)


def bits_per_byte(measured: Measured, source: str | None, seed: int) -> dict[str, float]:
    """Returns the bits per byte of one source, or of all.

    The interval, bpb_low to bpb_high, is the middle 95 % of 1000 resamplings of the documents (the
    percentile bootstrap, Efron 1979): how much the figure depends on the choice of documents.

    Args:
        measured: all documents.
        source: only the documents of this source; None: all.
        seed: of the resampling.

    Returns:
        bpb, bpb_low and bpb_high, and the documents, bytes and tokens that they are of.
    """
    chosen = np.array([source in (None, name) for name in measured.sources], dtype=bool)
    bits = measured.nats[chosen] / math.log(2)
    num_bytes = measured.num_bytes[chosen]
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "bootstrap")))
    resampled = []
    for _ in range(_RESAMPLES if len(bits) > 1 else 1):  # resamplings of one document are equal
        drawn = generator.integers(len(bits), size=len(bits))
        resampled.append(bits[drawn].sum() / num_bytes[drawn].sum())
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "bpb": float(bits.sum() / num_bytes.sum()),
        "bpb_low": float(low),
        "bpb_high": float(high),
        "documents": len(bits),
        "bytes": int(num_bytes.sum()),
        "tokens": int(measured.num_tokens[chosen].sum()),
    }
