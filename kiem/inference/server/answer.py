"""What /v1/completions answers, as OpenAI defines it, in whole or in parts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from kiem.inference.engine import Score
from kiem.inference.server.completions import Plan
from kiem.inference.streaming import Piece
from kiem.inference.text import TextStream
from kiem.tokenizer.tokenizer import BYTE_TOKENS, Tokenizer


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
        self._texts: dict[int, str] = {}  # of tokens that were told of before
        self._num_sequences = len(plan.requests) // len(plan.prompts)
        self._num_characters = [len(text) for text in self._echoes()]

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Returns the answer to a request without stream, from the pieces of each sequence."""
        choices = []
        for index, (echo, own) in enumerate(zip(self._echoes(), pieces, strict=True)):
            choices.append(self._choice(index, own, echo))
        return {**self._head, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """Returns the parts with which a stream begins: the prompts, if they are asked for.

        Those with probabilities come when they have been read.
        """
        echoes = [] if self._plan.scores_prompts else self._echoes()
        return [self._part(self._choice(i, [], e)) for i, e in enumerate(echoes) if e]

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """Returns the part of a stream that a piece of sequence `index` becomes."""
        echo = self._echoes()[index] if piece.prompt_scores is not None else ""
        return self._part(self._choice(index, [piece], echo))

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
        texts = self._plan.prompts if self._plan.echo else [""] * len(self._plan.prompts)
        return [text for text in texts for _ in range(self._num_sequences)]

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
        told = [entry for piece in pieces for entry in self._told(index, piece)]
        num_alternatives = self._plan.num_alternatives
        return {
            "tokens": [self._token_text(token) for token, _, _ in told],
            "token_logprobs": [None if score is None else score.logprob for _, score, _ in told],
            "top_logprobs": [
                None if score is None else self._by_text(score.alternatives[:num_alternatives])
                for _, score, _ in told
            ],
            "text_offset": [place for _, _, place in told],
        }

    def _told(self, index: int, piece: Piece) -> Iterator[tuple[int, Score | None, int]]:
        """Yields the tokens of a piece, their scores, and where in the text they begin."""
        if piece.prompt_scores is not None:
            yield from self._told_of_prompt(index, piece.prompt_scores)
        begin = self._num_characters[index]
        self._num_characters[index] += len(piece.text)
        if piece.logprob is None:
            return
        score = Score(piece.logprob, piece.alternatives)
        if piece.token is not None:
            yield piece.token, score, begin
        elif piece.finish_reason == "eos":
            yield self._tokenizer.eos_id, score, self._num_characters[index]

    def _told_of_prompt(
        self, index: int, scores: list[Score]
    ) -> Iterator[tuple[int, Score | None, int]]:
        number = index // self._num_sequences
        ids, num_characters = self._plan.prompt_ids[number], len(self._plan.prompts[number])
        known = scores[len(scores) - len(ids) + 1 :]
        stream, begin = TextStream(self._tokenizer), 0
        # The first has no score: OpenAI's API knows of nothing before it.
        for token, score in zip(ids, [None, *known], strict=False):
            yield token, score, min(begin, num_characters)
            begin += len(stream.add(token))

    def _by_text(self, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Returns tokens' probabilities by their text; of tokens with the same one the first's."""
        texts: dict[str, float] = {}
        for token, logprob in likeliest:
            texts.setdefault(self._token_text(token), logprob)
        return texts

    def _token_text(self, token: int) -> str:
        """Returns a token as text; one that is a byte as OpenAI writes it, such as bytes:\\xc3."""
        if token not in self._texts:
            self._texts[token] = self._decoded(token)
        return self._texts[token]

    def _decoded(self, token: int) -> str:
        entry = self._tokenizer.implementation.id_to_token(token)
        if entry in BYTE_TOKENS:
            return f"bytes:\\x{entry[3:5].lower()}"
        return self._tokenizer.decode([token]) or entry or ""

    def _usage(self) -> dict[str, int]:
        new, given = self._num_new_tokens, self._plan.num_prompt_tokens
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}
