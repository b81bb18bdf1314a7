"""Token ids to text while they come."""

from __future__ import annotations

import unicodedata

from rich.console import Console

from kiem.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what half a character decodes to
_MAX_TOKENS_IN_CHARACTER = 8


class TextStream:
    """Turns token ids into text one by one, holding back what may be half a character.

    A character outside the vocabulary is written as several byte tokens. (The DecodeStream of the
    tokenizers library stops with an error when a model writes bytes that are no character.)
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """Takes the next token and returns the text that is complete now; may be empty."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting)
        if text.endswith(_REPLACEMENT) and len(self._waiting) < _MAX_TOKENS_IN_CHARACTER:
            return ""
        self._waiting = []
        return text

    def end(self) -> str:
        """Returns what is still held back."""
        text = self._tokenizer.decode(self._waiting)
        self._waiting = []
        return text


def printable(text: str) -> str:
    """Returns text without the control characters that could steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def show(console: Console, text: str) -> None:
    """Writes text as it is, at once: no markup, no wrapping, no control sequences."""
    if not console.quiet:
        console.file.write(printable(text))
        console.file.flush()
