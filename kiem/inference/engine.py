"""The engine: requests in, new tokens out, as many requests at a time as there are slots.

A step first reads the prompts of waiting requests into free slots, then writes one token of every
running request. Running requests are always in the first slots, so that a step touches no others.
Shapes: B running requests, T tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kiem.inference.sampling import Sampling, choose_token
from kiem.model.cache import CachePass, KeyValueCache
from kiem.model.gemma3 import Gemma3

# Prompts are read in parts, which bounds the memory of a long prompt's attention.
_PREFILL_TOKENS = 512
# A vocabulary of logits for each: 128 rows of Gemma's take 134 MB.
_SCORED_TOKENS = 128
# Full layers look at a number of cache entries that is a multiple of this.
_ENTRIES_STEP = 256

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt_ids: the prompt's tokens with <bos>.
        max_new_tokens: most tokens to add; with 0 the prompt is read, and that is all.
        sampling: how tokens are chosen.
        generator_seed: seed of this request's own random generator.
        num_logprobs: how many of the likeliest tokens to tell of at each place; 0: tell nothing.
        scores_prompt: whether the prompt's own tokens are told of, too.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    generator_seed: int
    num_logprobs: int = 0
    scores_prompt: bool = False


class Score(NamedTuple):
    """How likely a token was.

    Attributes:
        logprob: log of its probability before any temperature or filter.
        alternatives: the likeliest tokens at its place with theirs.
    """

    logprob: float
    alternatives: list[tuple[int, float]]


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that has been read, of a request that asks for its scores or for nothing more.

    Attributes:
        request: the request's number.
        scores: of the prompt's tokens from the second one on; None if not asked for.
        finish_reason: "length" if there is nothing to add.
    """

    request: int
    scores: list[Score] | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Failure:
    """A request that has ended at an error."""

    request: int
    error: Exception


@dataclass(frozen=True)
class NewToken:
    """A token that a step added to a request.

    Attributes:
        request: the request's number.
        token: the token; the last one may be <eos>.
        logprob: log of its probability before any temperature or filter; None if not asked for.
        alternatives: the likeliest tokens with theirs, as many as the request asks for.
        finish_reason: why the request ends with this token; None if it goes on.
    """

    request: int
    token: int
    logprob: float | None
    alternatives: list[tuple[int, float]]
    finish_reason: FinishReason | None


Event = NewToken | ReadPrompt | Failure


@dataclass(eq=False)
class _Running:
    number: int
    request: Request
    generator: torch.Generator
    ids: list[int]  # prompt and new tokens; the last one is not in the cache yet


class Engine:
    """Continues many requests at a time (continuous batching).

    What a request is given depends on its own prompt, sampling and seed; its neighbours can change
    its logits only by the rounding of matrix products whose order of sums depends on their number
    of rows.

    Args:
        model: the model, in evaluation.
        eos_id: the token that ends a text.
        max_requests: most requests that run at a time; each takes memory for `max_tokens`.
        max_tokens: most tokens of a request, prompt included.
    """

    def __init__(self, model: Gemma3, eos_id: int, *, max_requests: int, max_tokens: int):
        self.max_tokens = max_tokens
        self._model = model
        self._eos_id = eos_id
        self._max_requests = max_requests
        self._device = model.model.norm.weight.device
        self._cache = KeyValueCache(
            model.config, max_requests, max_tokens, model.dtype, self._device
        )
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []  # by slot
        self._next_number = 0

    @property
    def num_running(self) -> int:
        """How many requests have a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Takes a request, to be begun as soon as a slot is free.

        Returns:
            The request's number, by which `step` and `cancel` know it.
        """
        assert request.prompt_ids, "a prompt has at least <bos>"
        assert request.max_new_tokens >= 0
        assert request.num_logprobs > 0 or not request.scores_prompt
        num_tokens = len(request.prompt_ids) + request.max_new_tokens
        assert num_tokens <= self.max_tokens, f"{num_tokens} tokens in a slot of {self.max_tokens}"
        number = self._next_number
        self._next_number += 1
        generator = torch.Generator().manual_seed(request.generator_seed)
        self._waiting.append(_Running(number, request, generator, list(request.prompt_ids)))
        return number

    def cancel(self, number: int) -> None:
        """Forgets a request; does nothing if it has ended already."""
        self._waiting = deque(entry for entry in self._waiting if entry.number != number)
        for slot, running in enumerate(self._running):
            if running.number == number:
                self._free(slot)
                return

    def step(self) -> list[NewToken]:
        """Does what `advance` does, for those who ask for new tokens only.

        Raises:
            Exception: what a request has failed at; the others may go on.
        """
        events = self.advance()
        for event in events:
            if isinstance(event, Failure):
                raise event.error
        return [event for event in events if isinstance(event, NewToken)]

    def advance(self) -> list[Event]:
        """Begins waiting requests while there are free slots, then goes on with all that run.

        A request that begins in this step gets its first token from its prompt and, unless that
        ends it, its second one. An error ends the request at which it occurs and frees its slot;
        one of the pass that they all share ends them all.

        Returns:
            What has happened, in that order; empty if there is nothing to do.
        """
        events: list[Event] = []
        # Not as a decorator: the mode must not stay on in the caller's code.
        with torch.inference_mode():
            while self._waiting and len(self._running) < self._max_requests:
                entry = self._waiting.popleft()
                try:
                    events += self._begin(entry)
                except Exception as error:  # noqa: BLE001 - whoever asked is told
                    events.append(self._fail(entry, error))
            if self._running:
                events += self._decode()
        return events

    def check_model(self, token: int) -> None:
        """Reads one token alone, to tell a fault of the model from one of a request.

        Raises:
            Exception: the model cannot even do that.
        """
        with torch.inference_mode():
            ids = torch.tensor([[token]], device=self._device)
            logits = self._model.logits(self._model.hidden_states(ids)[:, -1])
            choose_token(logits[0], ids[0], Sampling(temperature=0), torch.Generator())

    def _begin(self, entry: _Running) -> list[Event]:
        """Gives a request the first free slot and reads its prompt."""
        slot = len(self._running)
        self._running.append(entry)
        request = entry.request
        ids = torch.tensor([entry.ids], device=self._device)  # 1 T
        hidden = ids
        scores: list[Score] = []
        for start in range(0, ids.shape[1], _PREFILL_TOKENS):
            end = min(start + _PREFILL_TOKENS, ids.shape[1])
            positions = torch.arange(start, end, device=self._device)[None]
            where = CachePass(self._cache, slot, positions, end)
            hidden = self._model.hidden_states(ids[:, start:end], cached=where)
            if request.scores_prompt:
                scores += self._scores(hidden, ids[0, start + 1 : end + 1], request.num_logprobs)
        if request.max_new_tokens == 0:
            self._free(slot)
            return [ReadPrompt(entry.number, scores if request.scores_prompt else None, "length")]
        new = self._add_token(slot, self._model.logits(hidden[:, -1]))
        return [ReadPrompt(entry.number, scores, None), new] if request.scores_prompt else [new]

    def _scores(self, hidden: Tensor, following: Tensor, num_alternatives: int) -> list[Score]:
        """Returns the scores of `following` [T]: what comes after the places of `hidden` [1, T, D].

        Where the prompt ends, `hidden` has one place more, which nothing follows yet.
        """
        scores = []
        for part in range(0, len(following), _SCORED_TOKENS):
            tokens = following[part : part + _SCORED_TOKENS]  # N
            logits = self._model.logits(hidden[:, part : part + len(tokens)])[0]  # N V
            logprobs = logits.log_softmax(-1)
            own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
            alternatives = _likeliest(logprobs, num_alternatives)
            scores += [Score(*pair) for pair in zip(own, alternatives, strict=True)]
        return scores

    def _fail(self, entry: _Running, error: Exception) -> Failure:
        """Ends a request at an error."""
        if entry in self._running:
            self._free(self._running.index(entry))
        return Failure(entry.number, error)

    def _decode(self) -> list[Event]:
        """Writes one token of every running request."""
        try:
            logits = self._next_logits()  # B V
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            return [self._fail(entry, error) for entry in list(self._running)]
        events: list[Event] = []
        # From the last slot on: what moves into a freed slot has had its token already.
        for slot, entry in reversed(list(enumerate(self._running))):
            try:
                events.append(self._add_token(slot, logits[slot : slot + 1]))
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                events.append(self._fail(entry, error))
        return events[::-1]

    def _next_logits(self) -> Tensor:
        """Returns what follows the last token of every running request, [B, V]."""
        last = torch.tensor([[entry.ids[-1]] for entry in self._running], device=self._device)
        lengths = [len(entry.ids) for entry in self._running]
        positions = torch.tensor(lengths, device=self._device)[:, None] - 1  # B 1
        end = min(-(-max(lengths) // _ENTRIES_STEP) * _ENTRIES_STEP, self.max_tokens)
        where = CachePass(self._cache, 0, positions, end)
        return self._model.logits(self._model.hidden_states(last, cached=where)[:, 0])

    def _add_token(self, slot: int, logits: Tensor) -> NewToken:
        """Chooses a request's next token from its logits [1, V] and ends it if that is the last."""
        entry = self._running[slot]
        request = entry.request
        seen = torch.tensor(entry.ids, device=self._device)
        token = choose_token(logits[0], seen, request.sampling, entry.generator)
        logprob, alternatives = None, []
        if request.num_logprobs > 0:
            logprobs = logits.log_softmax(-1)
            logprob = float(logprobs[0, token])
            (alternatives,) = _likeliest(logprobs, request.num_logprobs)
        entry.ids.append(token)
        reason: FinishReason | None = None
        if token == self._eos_id:
            reason = "eos"
        elif len(entry.ids) == len(request.prompt_ids) + request.max_new_tokens:
            reason = "length"
        if reason is not None:
            self._free(slot)
        return NewToken(entry.number, token, logprob, alternatives, reason)

    def _free(self, slot: int) -> None:
        """Frees a slot; the request of the last slot moves into it."""
        last = self._running.pop()
        if slot < len(self._running):
            with torch.inference_mode():
                self._cache.copy_slot(len(self._running), slot)
            self._running[slot] = last


def _likeliest(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Returns the likeliest tokens of each row of [N, V] with their log probabilities."""
    found = logprobs.topk(min(count, logprobs.shape[1]))
    rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]
