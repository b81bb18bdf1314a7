"""The engine: requests in, new tokens out, as many requests at a time as there are slots.

A step first reads the prompts of waiting requests into free slots, then writes one token of every
running request. Running requests are always in the first slots, so that a step touches no others.
Shapes: B running requests, T tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kiem.inference.sampling import Sampling, choose_token
from kiem.model.cache import CachePass, KeyValueCache
from kiem.model.gemma3 import Gemma3

# Prompts are read in parts, which bounds the memory of a long prompt's attention.
_PREFILL_TOKENS = 512
# Full layers look at a number of cache entries that is a multiple of this.
_ENTRIES_STEP = 256

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt_ids: the prompt's tokens with <bos>.
        max_new_tokens: most tokens to add, at least 1.
        sampling: how tokens are chosen.
        generator_seed: seed of this request's own random generator.
        num_logprobs: how many of the likeliest tokens to tell of at each place; 0: tell nothing.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    generator_seed: int
    num_logprobs: int = 0


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


@dataclass
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
        assert request.max_new_tokens >= 1
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
        """Begins waiting requests while there are free slots, then goes on with all that run.

        A request that begins in this step gets its first token from its prompt and, unless that
        ends it, its second one.

        Returns:
            The new tokens in the order in which they came; empty if there is nothing to do.
        """
        new_tokens = []
        # Not as a decorator: the mode must not stay on in the caller's code.
        with torch.inference_mode():
            while self._waiting and len(self._running) < self._max_requests:
                new_tokens.append(self._begin(self._waiting.popleft()))
            if self._running:
                new_tokens += self._decode()
        return new_tokens

    def _begin(self, entry: _Running) -> NewToken:
        """Gives a request the first free slot and reads its prompt."""
        slot = len(self._running)
        self._running.append(entry)
        ids = torch.tensor([entry.ids], device=self._device)  # 1 T
        hidden = ids
        for start in range(0, ids.shape[1], _PREFILL_TOKENS):
            end = min(start + _PREFILL_TOKENS, ids.shape[1])
            positions = torch.arange(start, end, device=self._device)[None]
            where = CachePass(self._cache, slot, positions, end)
            hidden = self._model.hidden_states(ids[:, start:end], cached=where)
        return self._add_token(slot, self._model.logits(hidden[:, -1]))

    def _decode(self) -> list[NewToken]:
        """Writes one token of every running request."""
        last = torch.tensor([[entry.ids[-1]] for entry in self._running], device=self._device)
        lengths = [len(entry.ids) for entry in self._running]
        positions = torch.tensor(lengths, device=self._device)[:, None] - 1  # B 1
        end = min(-(-max(lengths) // _ENTRIES_STEP) * _ENTRIES_STEP, self.max_tokens)
        where = CachePass(self._cache, 0, positions, end)
        logits = self._model.logits(self._model.hidden_states(last, cached=where)[:, 0])  # B V
        # From the last slot on: what moves into a freed slot has had its token already.
        slots = reversed(range(len(self._running)))
        return [self._add_token(slot, logits[slot : slot + 1]) for slot in slots][::-1]

    def _add_token(self, slot: int, logits: Tensor) -> NewToken:
        """Chooses a request's next token from its logits [1, V] and ends it if that is the last."""
        entry = self._running[slot]
        request = entry.request
        seen = torch.tensor(entry.ids, device=self._device)
        token = choose_token(logits[0], seen, request.sampling, entry.generator)
        logprob, alternatives = None, []
        if request.num_logprobs > 0:
            logprobs = logits[0].log_softmax(-1)
            logprob = float(logprobs[token])
            likeliest = logprobs.topk(request.num_logprobs)
            alternatives = list(
                zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            )
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
