"""Responses of /v1/completions, as OpenAI defines them, in one piece or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

from kiem.inference.engine import RequestOutput, Score
from kiem.inference.server.completions import Completion, StreamOptions
from kiem.tokenizer.text_stream import TextStream
from kiem.tokenizer.tokenizer import BYTE_TOKENS, Tokenizer


class CompletionResponse:
    """Builds what the client gets from the engine's outputs.

    Args:
        asked: the request.
        model: the name that the model goes by.
        tokenizer: its tokenizer.
    """

    def __init__(self, asked: Completion, model: str, tokenizer: Tokenizer):
        self._asked = asked
        self._tokenizer = tokenizer
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._num_new_tokens = 0
        self._told = asked.body.stream_options or StreamOptions()
        self._echoes = [
            asked.prompts[request.prompt_number] if asked.body.echo else ""
            for request in asked.requests
        ]
        self._num_characters = [len(text) for text in self._echoes]

    def whole(self, outputs: Iterable[tuple[int, RequestOutput]]) -> dict[str, Any]:
        """Returns the response without a stream, from sequence and output as they came."""
        by_sequence: list[list[RequestOutput]] = [[] for _ in self._echoes]
        for index, output in outputs:
            by_sequence[index].append(output)
        choices = [self._choice(index, own) for index, own in enumerate(by_sequence)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def stream(
        self, outputs: AsyncIterator[tuple[int, RequestOutput]]
    ) -> AsyncIterator[dict[str, Any]]:
        """Yields the parts of a stream, from sequence and output as they come."""
        usage: dict[str, Any] = {}
        async for index, output in outputs:
            choice = self._choice(index, [output])
            if self._told.include_usage:
                usage["usage"] = self._usage() if self._told.continuous_usage_stats else None
            yield {**self._head, "choices": [choice], **usage}
        if self._told.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _choice(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Returns what the next outputs add to a sequence; its prompt comes with the first."""
        echo, self._echoes[index] = self._echoes[index], ""
        reason = outputs[-1].finish_reason
        has_logprobs = self._asked.body.logprobs is not None
        self._num_new_tokens += sum(output.num_tokens for output in outputs)
        return {
            "index": index,
            "text": echo + "".join(output.text for output in outputs),
            "logprobs": self._logprobs(index, outputs) if has_logprobs else None,
            "finish_reason": "stop" if reason == "eos" else reason,
        }

    def _logprobs(self, index: int, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        scored = [entry for output in outputs for entry in self._scored_tokens(index, output)]
        return {
            "tokens": [self._token_text(token) for token, _, _ in scored],
            "token_logprobs": [score.logprob if score else None for _, score, _ in scored],
            "top_logprobs": [self._by_text(score) if score else None for _, score, _ in scored],
            "text_offset": [offset for _, _, offset in scored],
        }

    def _scored_tokens(
        self, index: int, output: RequestOutput
    ) -> Iterator[tuple[int, Score | None, int]]:
        """Yields the tokens of an output, their scores, and their offsets in the text."""
        if output.prompt_scores is not None:
            number = self._asked.requests[index].prompt_number
            ids = self._asked.prompt_ids[number]
            known = output.prompt_scores[len(output.prompt_scores) - len(ids) + 1 :]
            stream, offset = TextStream(self._tokenizer), 0
            # The first has no score: OpenAI's API knows of nothing before it.
            for token, score in zip(ids, [None, *known], strict=False):
                added = stream.add(token)
                offset += len(added)
                place = self._place(token, added, offset)
                yield token, score, min(place, len(self._asked.prompts[number]))
        self._num_characters[index] += len(output.text)
        if output.token is not None:
            end = self._num_characters[index]
            is_eos = output.finish_reason == "eos"
            place = end if is_eos else self._place(output.token, output.text, end)
            yield output.token, output.score, place

    def _place(self, token: int, added: str, end: int) -> int:
        """Returns where a token begins in the text, which ends at `end` with what it has added."""
        own = self._tokenizer.decode([token])
        # Bytes before it that are no character become one only now.
        return end - len(own if added.endswith(own) else added)

    def _by_text(self, score: Score) -> dict[str, float]:
        """Returns the probabilities of tokens by their text; of equal texts the first token's."""
        texts: dict[str, float] = {}
        for token, logprob in score.alternatives[: self._asked.body.logprobs]:
            texts.setdefault(self._token_text(token), logprob)
        return texts

    def _token_text(self, token: int) -> str:
        """Returns a token as text; a byte as OpenAI writes it, such as bytes:\\xc3."""
        entry = self._tokenizer.implementation.id_to_token(token)
        if entry in BYTE_TOKENS:
            return f"bytes:\\x{entry[3:5].lower()}"
        return self._tokenizer.decode([token]) or entry or ""

    def _usage(self) -> dict[str, int]:
        new, given = self._num_new_tokens, self._asked.num_prompt_tokens
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}
