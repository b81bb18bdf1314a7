"""A small fastText model: it tells a text's label by words that each label has."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

_SOFTMAX, _SUPERVISED = 3, 3


def model_bytes(words: dict[str, list[str]], sharpness: float = 8.0) -> bytes:
    """Returns a model file; a text's hidden vector is the share of each label's words in it."""
    size = len(words)
    known = [(word, number) for number, each in enumerate(words.values()) for word in each]
    arguments = (size, 5, 1, 1, 5, 1, _SOFTMAX, _SUPERVISED, 0, 0, 0, 100, 1e-4)
    data = struct.pack("<14id", 793712314, 12, *arguments)
    data += struct.pack("<3i2q", len(known) + size, len(known), size, len(known), -1)
    entries = [(word, 0) for word, _ in known] + [(f"__label__{label}", 1) for label in words]
    for text, kind in entries:
        data += text.encode() + b"\0" + struct.pack("<qb", 1, kind)
    vectors = np.eye(size, dtype=np.float32)[[number for _, number in known]]
    for matrix in (vectors, np.eye(size, dtype=np.float32) * sharpness):
        data += b"\0" + struct.pack("<2q", *matrix.shape) + matrix.tobytes()
    return data


def write_model(path: Path, words: dict[str, list[str]], sharpness: float = 8.0) -> Path:
    path.write_bytes(model_bytes(words, sharpness))
    return path
