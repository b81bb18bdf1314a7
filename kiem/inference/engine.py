"""Continuous batching: requests in, new tokens and their text out, many requests at a time.

A step first reads the prompts of waiting requests into free slots, then adds one token to every
running request. Running requests occupy the first slots, so a step touches no others.
Shapes: B running requests, N tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kiem.core.randomness import derive_seed
from kiem.inference.sampling import SamplingParams, choose_token
from kiem.inference.slots import DeviceSlots, Slots
from kiem.model.cache import CachePass
from kiem.model.gemma3 import Gemma3
from kiem.tokenizer.text_stream import TextStream
from kiem.tokenizer.tokenizer import Tokenizer

# Prompts are read in parts, which bounds the memory of a long prompt's attention.
_PREFILL_TOKENS = 512
# A vocabulary of logits for each: 128 rows of Gemma's take 134 MB.
_SCORED_TOKENS = 128

FinishReason = Literal["eos", "length", "stop", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt_ids: the prompt's tokens with <bos>.
        params: how tokens are chosen, and when the text ends.
        seed, prompt_number, sequence: determine the choices; the number of the prompt among
            several, and of the continuation among those of its prompt.
        num_logprobs: how many of the likeliest tokens to report at each position; 0: no
            probabilities at all.
        scores_prompt: whether the prompt's own tokens are scored, too.
    """

    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    prompt_number: int = 0
    sequence: int = 0
    num_logprobs: int = 0
    scores_prompt: bool = False


class Score(NamedTuple):
    """How likely a token was, before temperature and filters.

    Attributes:
        logprob: log of its probability.
        alternatives: the likeliest tokens at its position with theirs.
    """

    logprob: float
    alternatives: list[tuple[int, float]]


@dataclass(frozen=True)
class RequestOutput:
    """What a step adds to a request.

    Attributes:
        request_id: the request's number in its engine.
        text: new text; may be empty, since a character can take several tokens.
        token: the new token, the last one perhaps <eos>; None if there is none.
        score: of the token, if asked for.
        prompt_scores: once, if asked for: of the prompt's tokens from the second one on.
        finish_reason: why the request ends here; None if it goes on. "stop" is a stop string.
        error: the error that has ended the request, with "error".
    """

    request_id: int
    text: str = ""
    token: int | None = None
    score: Score | None = None
    prompt_scores: list[Score] | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def num_tokens(self) -> int:
        """1 for a new token of text; <eos> does not count."""
        return int(self.token is not None and self.finish_reason != "eos")


@dataclass(eq=False)
class _Sequence:
    """A request that waits or runs."""

    number: int
    request: Request
    text: TextStream | None
    num_new_tokens: int = 0


class Engine:
    """Continues many requests at a time.

    The result of a request depends on its own prompt, parameters and seed. Its neighbours change
    its logits only through the rounding of matrix products whose order of sums depends on their
    number of rows.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's; None: tokens only, which no <eos> ends.
        max_requests: most requests that run at a time; each takes memory for `max_tokens`.
        max_tokens: most tokens of a request, prompt included.
        on_device: whether a step runs on the device as a whole, for which `DeviceSlots` changes the
            model and makes CUDA graphs, which take memory and time; None: on GPUs.

    Attributes:
        device: the model's.
    """

    def __init__(
        self,
        model: Gemma3,
        tokenizer: Tokenizer | None,
        *,
        max_requests: int,
        max_tokens: int,
        on_device: bool | None = None,
    ):
        self.max_tokens = max_tokens
        self._model = model
        self._tokenizer = tokenizer
        self._max_requests = max_requests
        self.device = model.model.norm.weight.device
        if on_device is None:
            on_device = self.device.type == "cuda"
        self._slots = (DeviceSlots if on_device else Slots)(model, max_requests, max_tokens)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # by slot
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
        """Takes a request, which begins as soon as a slot is free, and returns its number."""
        assert request.prompt_ids, "a prompt has at least <bos>"
        assert request.num_logprobs > 0 or not request.scores_prompt
        num_tokens = len(request.prompt_ids) + request.params.max_new_tokens
        assert num_tokens <= self.max_tokens, f"{num_tokens} tokens in a slot of {self.max_tokens}"
        number = self._next_number
        self._next_number += 1
        text = TextStream(self._tokenizer, request.params.stop) if self._tokenizer else None
        self._waiting.append(_Sequence(number, request, text))
        return number

    def cancel(self, number: int) -> None:
        """Forgets a request; does nothing if it has ended already."""
        self._waiting = deque(entry for entry in self._waiting if entry.number != number)
        for slot, entry in enumerate(self._running):
            if entry.number == number:
                self._free(slot)
                return

    def stream(self, requests: Iterable[Request]) -> Generator[tuple[int, RequestOutput]]:
        """Yields the outputs of requests, with their indices, until all have ended.

        It takes a request from the iterable when a slot is free, and cancels those that run when
        it is closed. The engine must have no other requests.

        Raises:
            Exception: the error that has ended a request.
        """
        assert not self._running and not self._waiting
        first, waiting = self._next_number, iter(requests)
        try:
            while True:
                for request in islice(waiting, self._max_requests - len(self._running)):
                    self.add(request)
                outputs = self.step()
                if not outputs:
                    return
                for output in outputs:
                    if output.error is not None:
                        raise output.error
                    yield output.request_id - first, output
        finally:
            self._waiting.clear()
            self._running.clear()

    def step(self) -> list[RequestOutput]:
        """Begins waiting requests while there are free slots, then continues all that run.

        A request that begins gets its first token from its prompt and, unless that ends it, its
        second one. An error ends the request in which it occurs and frees its slot; an error in
        the pass that all share ends them all.

        Returns:
            The outputs in the order they came; empty if there is nothing to do.
        """
        outputs: list[RequestOutput] = []
        # Not as a decorator: the mode must not stay on in the caller's code.
        with torch.inference_mode():
            while self._waiting and len(self._running) < self._max_requests:
                entry = self._waiting.popleft()
                try:
                    outputs.append(self._begin(entry))
                except Exception as error:  # noqa: BLE001 - the output has it
                    outputs.append(self._fail(entry, error))
            if self._running:
                outputs += self._decode()
        return outputs

    def check_model(self) -> None:
        """Reads <bos> alone, to tell an error of the model from an error of a request.

        Raises:
            Exception: the model cannot even do that.
        """
        assert self._tokenizer is not None
        with torch.inference_mode():
            ids = torch.tensor([[self._tokenizer.bos_id]], device=self.device)
            logits = self._model.logits(self._model.hidden_states(ids)[:, -1])
            choose_token(logits[0], ids[0], SamplingParams(temperature=0), torch.Generator())

    def _begin(self, entry: _Sequence) -> RequestOutput:
        """Gives a request the first free slot, reads its prompt and adds the first token."""
        slot = len(self._running)
        self._running.append(entry)
        request = entry.request
        seed = derive_seed(request.seed, "sample", request.prompt_number, request.sequence)
        generator = torch.Generator().manual_seed(seed)
        ids = self._slots.begin(slot, request.prompt_ids, request.params, generator)  # 1 N
        hidden = ids
        scores: list[Score] = []
        for start in range(0, ids.shape[1], _PREFILL_TOKENS):
            end = min(start + _PREFILL_TOKENS, ids.shape[1])
            positions = torch.arange(start, end, device=self.device)[None]
            where = CachePass(self._slots.cache, slot, positions, end)
            hidden = self._model.hidden_states(ids[:, start:end], cached=where)
            if request.scores_prompt:
                following = ids[0, start + 1 : end + 1]  # one shorter at the prompt's end
                for part in range(0, len(following), _SCORED_TOKENS):
                    tokens = following[part : part + _SCORED_TOKENS]
                    logits = self._model.logits(hidden[0, part : part + len(tokens)])
                    scores += _scores(logits, tokens, request.num_logprobs)
        prompt_scores = scores if request.scores_prompt else None
        if request.params.max_new_tokens == 0:
            self._free(slot)
            return RequestOutput(entry.number, prompt_scores=prompt_scores, finish_reason="length")
        logits = self._model.logits(hidden[:, -1])
        output = self._add_token(slot, self._slots.first_token(slot, logits), logits)
        return replace(output, prompt_scores=prompt_scores)

    def _decode(self) -> list[RequestOutput]:
        """Adds one token to every running request."""
        try:
            logits = self._slots.step(len(self._running))  # B V
        except Exception as error:  # noqa: BLE001 - the outputs have it
            return [self._fail(entry, error) for entry in list(self._running)]
        outputs = []
        # From the last slot on: what moves into a freed slot has had its token already.
        for slot, entry in reversed(list(enumerate(self._running))):
            try:
                token = self._slots.token(slot)
                outputs.append(self._add_token(slot, token, logits[slot : slot + 1]))
            except Exception as error:  # noqa: BLE001 - the output has it
                outputs.append(self._fail(entry, error))
        return outputs[::-1]

    def _add_token(self, slot: int, token: int, logits: Tensor) -> RequestOutput:
        """Adds a token, chosen from logits [1, V], to a request, and frees its slot at the end."""
        entry = self._running[slot]
        request = entry.request
        score = None
        if request.num_logprobs > 0:
            chosen = torch.tensor([token], device=self.device)
            (score,) = _scores(logits, chosen, request.num_logprobs)
        entry.num_new_tokens += 1
        reason: FinishReason | None = None
        if self._tokenizer is not None and token == self._tokenizer.eos_id:
            reason = "eos"
        elif entry.num_new_tokens == request.params.max_new_tokens:
            reason = "length"
        text = ""
        if entry.text is not None:
            text = "" if reason == "eos" else entry.text.add(token)
            text += "" if reason is None else entry.text.end()
            reason = "stop" if entry.text.is_stopped else reason
        if reason is not None:
            self._free(slot)
        return RequestOutput(entry.number, text, token, score, finish_reason=reason)

    def _fail(self, entry: _Sequence, error: Exception) -> RequestOutput:
        """Ends a request at an error."""
        if entry in self._running:
            self._free(self._running.index(entry))
        return RequestOutput(entry.number, finish_reason="error", error=error)

    def _free(self, slot: int) -> None:
        """Frees a slot; the request of the last slot moves into it."""
        last = self._running.pop()
        if slot < len(self._running):
            with torch.inference_mode():
                self._slots.move(len(self._running), slot)
            self._running[slot] = last


def complete(
    model: Gemma3, tokenizer: Tokenizer, prompt: str, params: SamplingParams, seed: int
) -> str:
    """Returns one continuation of a prompt."""
    request = Request([tokenizer.bos_id, *tokenizer.encode(prompt)], params, seed)
    max_tokens = len(request.prompt_ids) + params.max_new_tokens
    # For a single text, perhaps within training, graphs are not worth their time and memory.
    engine = Engine(model, tokenizer, max_requests=1, max_tokens=max_tokens, on_device=False)
    return "".join(output.text for _, output in engine.stream([request]))


def _scores(logits: Tensor, tokens: Tensor, num_alternatives: int) -> list[Score]:
    """Returns the scores of `tokens` [N] under `logits` [N, V]."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    found = logprobs.topk(min(num_alternatives, logprobs.shape[1]))
    rows = zip(own, found.indices.tolist(), found.values.tolist(), strict=True)
    return [Score(logprob, [*zip(ids, values, strict=True)]) for logprob, ids, values in rows]
