"""What /v1/completions is asked, as OpenAI defines it, and what the engine shall do for it.

https://platform.openai.com/docs/api-reference/completions. What a request may say beyond that
(top_k, min_p, repetition_penalty) is called as vLLM calls it. Fields that others define and kiem
has nothing for are in kiem/inference/server/foreign.py.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from kiem.inference.engine import Request
from kiem.inference.sampling import Sampling, generator_seed, out_of_range
from kiem.inference.server.errors import ApiError, shown
from kiem.inference.server.foreign import without_foreign
from kiem.tokenizer.tokenizer import Tokenizer

_MOST_STOPS = 16
_MOST_STOP_CHARACTERS = 256
_MOST_LOGPROBS = 20

Count = Annotated[int, msgspec.Meta(ge=1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """The field stream_options."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's
    include_obfuscation: bool = False  # OpenAI pads its stream with noise; kiem never does


class CompletionBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request; None stands for the server's default."""

    prompt: str | list[str | int | list[int]]
    model: str | None = None
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=_MOST_LOGPROBS)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    min_p: float | None = None
    n: Count | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    user: str | None = None


@dataclass(frozen=True)
class Limits:
    """What the server was started with.

    Attributes:
        model: the name that the model goes by.
        sampling, max_new_tokens, stop: what holds where a request says nothing.
        max_context: most tokens of a prompt and its continuation together.
        max_sequences: most sequences that run or wait, of all requests together.
    """

    model: str
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    max_context: int
    max_sequences: int


@dataclass(frozen=True)
class Plan:
    """A request that is understood.

    Attributes:
        requests: what the engine shall do, the sequences of the first prompt first.
        prompts: the text of each prompt.
        prompt_ids: the tokens of each: of texts with <bos>, else those given.
        num_prompt_tokens: of all prompts, each counted once.
        stop: texts that end a sequence.
        num_alternatives: how many tokens to tell of at each place; None: nothing of probabilities.
        echo: whether the prompt is part of the answer.
        stream: whether the answer comes in pieces.
        include_usage: whether such an answer ends with the numbers of tokens.
    """

    requests: list[Request]
    prompts: list[str]
    prompt_ids: list[list[int]]
    num_prompt_tokens: int
    stop: Sequence[str]
    num_alternatives: int | None
    echo: bool
    stream: bool
    include_usage: bool

    @property
    def scores_prompts(self) -> bool:
        """Whether the tokens of the prompts are told of, too."""
        return self.echo and self.num_alternatives is not None


def read_body(data: bytes) -> CompletionBody:
    """Returns what a request's JSON says.

    Raises:
        ApiError: it is not JSON, or a field is unknown or of another type or range.
    """
    try:
        given = msgspec.json.decode(data, type=dict[str, Any])
        if given.get("logprobs") is False:  # as in OpenAI's API for chats
            del given["logprobs"]
        return msgspec.convert(without_foreign(given), CompletionBody)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        unknown = re.search(r"unknown field `(.*)`", what, re.DOTALL)
        if unknown and not path:
            known = ", ".join(CompletionBody.__struct_fields__)
            message = f"There is no field {shown(unknown[1])} here; there are {known}."
            raise ApiError(400, message, param=shown(unknown[1])) from error
        names = re.findall(r"\w+", path)
        where = f"{path.strip('.`')}: " if names else ""
        raise ApiError(400, f"{where}{what}.", param=names[0] if names else None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error


def plan(body: CompletionBody, limits: Limits, tokenizer: Tokenizer) -> Plan:
    """Returns what to do for a request.

    Raises:
        ApiError: it asks for what this server cannot do.
    """
    if body.model is not None and body.model != limits.model:
        message = f"The model {shown(body.model)} is not here; the only one is {limits.model}."
        raise ApiError(404, message, param="model", code="model_not_found")
    num_sequences = body.n or 1
    if body.best_of not in (None, num_sequences):
        message = f"best_of is {shown(body.best_of)}; what works: n, here {shown(num_sequences)}."
        raise ApiError(400, message, param="best_of")
    include_usage = _include_usage(body)
    prompts = _prompts(body.prompt)
    if len(prompts) * num_sequences > limits.max_sequences:
        message = f"More than {limits.max_sequences} sequences at once are never possible here."
        raise ApiError(400, message, param="n" if len(prompts) == 1 else "prompt")
    sampling = _sampling(body, limits.sampling)
    max_new_tokens = limits.max_new_tokens if body.max_tokens is None else body.max_tokens
    seed = secrets.randbits(63) if body.seed is None else body.seed
    ids = [_prompt_ids(prompt, tokenizer) for prompt in prompts]
    longest = max(map(len, ids))
    if longest + max_new_tokens > limits.max_context:
        message = (
            f"{longest} tokens of the prompt and {shown(max_new_tokens)} new ones are more than "
            f"the {limits.max_context} that fit."
        )
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    num_alternatives = body.logprobs
    scores_prompts = bool(body.echo) and num_alternatives is not None
    requests = [
        Request(
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            generator_seed=generator_seed(seed, number, sequence),
            # The engine tells the chosen token's probability only beside some other's.
            num_logprobs=0 if num_alternatives is None else max(1, num_alternatives),
            scores_prompt=scores_prompts,
        )
        for number, prompt_ids in enumerate(ids)
        for sequence in range(num_sequences)
    ]
    return Plan(
        requests,
        [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts],
        [read if isinstance(p, str) else p for p, read in zip(prompts, ids, strict=True)],
        sum(map(len, ids)),
        _stop(body.stop) if body.stop is not None else limits.stop,
        num_alternatives,
        bool(body.echo),
        bool(body.stream),
        include_usage,
    )


def _include_usage(body: CompletionBody) -> bool:
    wanted = body.stream_options or StreamOptions()
    wrong = None
    if wanted.continuous_usage_stats:
        wrong = "continuous_usage_stats is true; what works: include_usage"
    elif wanted.include_usage and not body.stream:
        wrong = "include_usage is true; what works: false, or stream: true"
    if wrong is not None:
        raise ApiError(400, f"stream_options.{wrong}.", param="stream_options")
    return wanted.include_usage


def _prompts(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    ids = [prompt for prompt in given if isinstance(prompt, int)]
    lists = [prompt for prompt in given if isinstance(prompt, list)]
    if not given or max(len(texts), len(ids), len(lists)) != len(given):
        message = "prompt must be a text, a list of texts, token ids, or a list of token ids."
        raise ApiError(400, message, param="prompt")
    return [ids] if ids else [*texts, *lists]


def _prompt_ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if not all(0 <= token < tokenizer.num_rows for token in prompt):
        message = f"Token ids are 0 to {tokenizer.num_rows - 1}."
        raise ApiError(400, message, param="prompt")
    return prompt if prompt[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *prompt]


def _sampling(body: CompletionBody, default: Sampling) -> Sampling:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if given.get("top_k") == -1:  # as vLLM and llama.cpp call all of them
        given["top_k"] = 0
    sampling = replace(default, **given)
    if wrong := out_of_range(sampling):
        name, possible = wrong
        message = f"{name} is {shown(getattr(sampling, name))}; possible are {possible}."
        raise ApiError(400, message, param=name)
    return sampling


def _stop(given: str | list[str]) -> list[str]:
    stop = [given] if isinstance(given, str) else given
    fine = all(0 < len(text) <= _MOST_STOP_CHARACTERS for text in stop)
    if len(stop) > _MOST_STOPS or not fine:
        message = f"stop: at most {_MOST_STOPS} texts of 1 to {_MOST_STOP_CHARACTERS} characters."
        raise ApiError(400, message, param="stop")
    return stop
