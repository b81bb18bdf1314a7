"""Incremental decoding of token ids to text."""

from __future__ import annotations

from collections.abc import Sequence

from kiem.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what half a character decodes to
_MAX_TOKENS_IN_CHARACTER = 8


class TextStream:
    """Decodes tokens one by one, up to the first stop string.

    It holds back what may be half a character, which a vocabulary can write as several byte
    tokens, and what may be the beginning of a stop string. (The DecodeStream of the tokenizers
    library fails when a model writes bytes that are no character.)

    Args:
        tokenizer: of the tokens.
        stop: strings that end the text and are left out. The one that is complete first counts;
            of those complete with the same character, the one that began first.

    Attributes:
        is_stopped: whether a stop string has come; there is no more text then.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        assert all(stop), "an empty stop string"
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._waiting: list[int] = []  # tokens of half a character
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Takes the next token and returns the text that is complete now; may be empty."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting)
        if text.endswith(_REPLACEMENT) and len(self._waiting) < _MAX_TOKENS_IN_CHARACTER:
            return ""
        self._waiting = []
        return self._until_stop(text)

    def end(self) -> str:
        """Returns what is still held back."""
        text = self._until_stop(self._tokenizer.decode(self._waiting)) + self._held
        self._waiting, self._held = [], ""
        return text

    def _until_stop(self, text: str) -> str:
        """Takes text and returns what of it, and of the text held before, no stop can take back."""
        if self.is_stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            self.is_stopped = True
            return text[: min((start + len(stop), start) for start, stop in found)[1]]
        longest = max(map(len, self._stop), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                self._held = text[-length:]
                return text[:-length]
        return text
