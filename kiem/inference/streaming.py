"""Prompts in, text out: the engine's tokens as text while they come."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kiem.inference.engine import Engine, Failure, NewToken, ReadPrompt, Request, Score
from kiem.inference.sampling import Sampling, generator_seed
from kiem.inference.text import TextStream
from kiem.model.gemma3 import Gemma3
from kiem.tokenizer.tokenizer import Tokenizer

FinishReason = Literal["eos", "length", "stop", "error"]


@dataclass(frozen=True)
class Piece:
    """What one new token adds to a text, or what else happens to it.

    Attributes:
        number: the request's number.
        text: new text; may be empty, since a character can take several tokens.
        token: the new token id; None for <eos>, and where there is none.
        logprob, alternatives: as in NewToken.
        finish_reason: None, or why the text ends here: "stop" is a stop string.
        prompt_scores: as in ReadPrompt, once, before the first new token.
        error: what has ended the text, with "error".
    """

    number: int
    text: str
    token: int | None
    logprob: float | None
    alternatives: list[tuple[int, float]]
    finish_reason: FinishReason | None
    prompt_scores: list[Score] | None = None
    error: Exception | None = None


class Writer:
    """An engine that gives text.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        max_requests: most texts that are written at the same time.
        max_tokens: most tokens of a text, its prompt included.

    Attributes:
        max_tokens: as given.
    """

    def __init__(self, model: Gemma3, tokenizer: Tokenizer, *, max_requests: int, max_tokens: int):
        self._engine = Engine(
            model, tokenizer.eos_id, max_requests=max_requests, max_tokens=max_tokens
        )
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._streams: dict[int, TextStream] = {}

    @property
    def num_running(self) -> int:
        """How many texts are being written."""
        return self._engine.num_running

    @property
    def num_waiting(self) -> int:
        """How many texts wait for others to end."""
        return self._engine.num_waiting

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._streams)

    def add(self, request: Request, stop: Sequence[str] = ()) -> int:
        """Takes a request and returns its number.

        Args:
            request: what to write.
            stop: strings that end the text, and are left out.
        """
        number = self._engine.add(request)
        self._streams[number] = TextStream(self._tokenizer, stop)
        return number

    def cancel(self, number: int) -> None:
        """Forgets a request; does nothing if it has ended already."""
        if self._streams.pop(number, None) is not None:
            self._engine.cancel(number)

    def step(self) -> list[Piece]:
        """Writes some tokens of every running text and returns them in the order they came.

        Raises:
            Exception: what a text has ended at; the others may go on.
        """
        pieces = self.advance()
        for piece in pieces:
            if piece.error is not None:
                raise piece.error
        return pieces

    def advance(self) -> list[Piece]:
        """Does what `step` does, but an error is a piece of the text that it has ended."""
        # A step may give two tokens of a request, of which the first can complete a stop string.
        return [
            self._piece(event) for event in self._engine.advance() if event.request in self._streams
        ]

    def check_model(self) -> None:
        """Lets the model read <bos> alone.

        Raises:
            Exception: it cannot: the fault is not a request's.
        """
        self._engine.check_model(self._tokenizer.bos_id)

    def stream(
        self, requests: Sequence[Request], stop: Sequence[str] = ()
    ) -> Generator[Piece, None, None]:
        """Yields the pieces of requests, which count from 0 here, until all have ended.

        What has not ended is cancelled when the iterator is closed. Not beside other requests.
        """
        assert not self.is_busy
        places = {self.add(request, stop): place for place, request in enumerate(requests)}
        try:
            while self.is_busy:
                for piece in self.step():
                    yield replace(piece, number=places[piece.number])
        finally:
            for number in places:
                self.cancel(number)

    def _piece(self, event: NewToken | ReadPrompt | Failure) -> Piece:
        if isinstance(event, Failure):
            return self._failed(event.request, event.error)
        if isinstance(event, ReadPrompt):
            if event.finish_reason is not None:
                del self._streams[event.request]
            return Piece(event.request, "", None, None, [], event.finish_reason, event.scores)
        try:
            return self._new_piece(event)
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            return self._failed(event.request, error)

    def _failed(self, number: int, error: Exception) -> Piece:
        self.cancel(number)
        return Piece(number, "", None, None, [], "error", error=error)

    def _new_piece(self, new: NewToken) -> Piece:
        stream = self._streams[new.request]
        is_eos = new.finish_reason == "eos"
        text = "" if is_eos else stream.add(new.token)
        reason: FinishReason | None = new.finish_reason
        if reason is not None and not stream.is_stopped:
            text += stream.end()
        if stream.is_stopped:
            reason = "stop"
            self._engine.cancel(new.request)
        if reason is not None:
            del self._streams[new.request]
        token = None if is_eos else new.token
        return Piece(new.request, text, token, new.logprob, new.alternatives, reason)


def request_for(
    prompt: str,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    prompt_number: int = 0,
    sequence: int = 0,
) -> Request:
    """Returns the request for a continuation of a prompt.

    Args:
        prompt: the text to continue; may be empty.
        tokenizer: the model's.
        max_new_tokens: most tokens to add.
        sampling: how tokens are chosen.
        seed: with the two numbers below determines the choices.
        prompt_number: place of the prompt among several.
        sequence: place of the continuation among those of its prompt.
    """
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    chance = generator_seed(seed, prompt_number, sequence)
    return Request(prompt_ids, max_new_tokens, sampling, chance)


def complete(
    model: Gemma3,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> str:
    """Returns one continuation of a prompt as a whole; arguments as in `request_for`."""
    request = request_for(
        prompt, tokenizer, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed
    )
    max_tokens = len(request.prompt_ids) + max_new_tokens
    writer = Writer(model, tokenizer, max_requests=1, max_tokens=max_tokens)
    return "".join(piece.text for piece in writer.stream([request]))
