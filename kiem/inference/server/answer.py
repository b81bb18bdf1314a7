"""What /v1/completions answers, as OpenAI defines it, in whole or in parts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from kiem.data.tokenizer import BYTE_TOKENS, Tokenizer
from kiem.inference.server.completions import Plan
from kiem.inference.streaming import Piece


class Answer:
    """Builds what the client gets from the engine's pieces.

    Args:
        plan: the request.
        model: the name that the model goes by.
        tokenizer: its tokenizer.
    """

    def __init__(self, plan: Plan, model: str, tokenizer: Tokenizer):
        self._plan = plan
        self._tokenizer = tokenizer
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._num_new_tokens = 0
        self._num_characters = [len(text) for text in self._echoes()]

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Returns the answer to a request without stream, from the pieces of each sequence."""
        choices = []
        for index, (echo, own) in enumerate(zip(self._echoes(), pieces, strict=True)):
            choice = self._choice(index, own)
            choices.append({**choice, "text": echo + choice["text"]})
        return {**self._head, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """Returns the parts with which a stream begins: the prompts, if they are asked for."""
        return [self._part(self._choice(i, [], e)) for i, e in enumerate(self._echoes()) if e]

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the part of a stream that a piece of sequence `index` becomes."""
        return self._part(self._choice(index, [piece]))

    def closing(self) -> list[dict[str, Any]]:
        """Returns the part with the numbers of tokens, if it is asked for."""
        last = {**self._head, "choices": [], "usage": self._usage()}
        return [last] if self._plan.include_usage else []

    def _part(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [choice],
            **({"usage": None} if self._plan.include_usage else {}),
        }

    def _echoes(self) -> list[str]:
        num_sequences = len(self._plan.requests) // len(self._plan.prompts)
        texts = self._plan.prompts if self._plan.echo else [""] * len(self._plan.prompts)
        return [text for text in texts for _ in range(num_sequences)]

    def _choice(self, index: int, pieces: Sequence[Piece], text: str = "") -> dict[str, Any]:
        reason = pieces[-1].finish_reason if pieces else None
        logprobs = None if self._plan.num_alternatives is None else self._logprobs(index, pieces)
        self._num_new_tokens += sum(piece.token is not None for piece in pieces)
        return {
            "index": index,
            "text": text + "".join(piece.text for piece in pieces),
            "logprobs": logprobs,
            "finish_reason": "stop" if reason == "eos" else reason,
        }

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        told: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for piece in pieces:
            if piece.token is not None:
                likeliest = piece.alternatives[: self._plan.num_alternatives]
                told["tokens"].append(self.token_text(piece.token))
                told["token_logprobs"].append(piece.logprob)
                told["top_logprobs"].append(self._by_text(likeliest))
                told["text_offset"].append(self._num_characters[index])
            self._num_characters[index] += len(piece.text)
        return told

    def _by_text(self, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Returns tokens' probabilities by their text; of tokens with the same one the first's."""
        texts: dict[str, float] = {}
        for token, logprob in likeliest:
            texts.setdefault(self.token_text(token), logprob)
        return texts

    def token_text(self, token: int) -> str:
        """Returns a token as text; one that is a byte as OpenAI writes it, such as bytes:\\xc3."""
        entry = self._tokenizer.implementation.id_to_token(token)
        if entry in BYTE_TOKENS:
            return f"bytes:\\x{entry[3:5].lower()}"
        return self._tokenizer.decode([token]) or entry or ""

    def _usage(self) -> dict[str, int]:
        new, given = self._num_new_tokens, self._plan.num_prompt_tokens
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}
