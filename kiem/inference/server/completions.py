"""What /v1/completions is asked, as OpenAI defines it, and what the engine shall do for it.

https://platform.openai.com/docs/api-reference/completions. What a request may say beyond that
(top_k, min_p, repetition_penalty) is called as vLLM calls it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from kiem.data.tokenizer import Tokenizer
from kiem.inference.engine import Request
from kiem.inference.sampling import Sampling, generator_seed, out_of_range

_MOST_STOPS = 16
_MOST_STOP_CHARACTERS = 256
_MOST_LOGPROBS = 20

Count = Annotated[int, msgspec.Meta(ge=1)]
# OpenAI's clients may send these; kiem has nothing of the kind, so only "off" is taken.
Off = Annotated[float, msgspec.Meta(ge=0, le=0)]


class ApiError(Exception):
    """An answer that is an error in OpenAI's form.

    Args:
        status: the HTTP status.
        message: what is wrong.
        param: the field of the request that it is about.
        code: OpenAI's word for it, if there is one.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Returns the JSON that the client gets."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kinds.get(self.status, kind)}
        return {"error": {**error, "param": self.param, "code": self.code}}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """The field stream_options."""

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI pads its stream with noise; kiem never does


class CompletionBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request; None stands for the server's default."""

    prompt: str | list[str | int | list[int]]
    model: str | None = None
    best_of: Count | None = None
    echo: bool | None = None
    frequency_penalty: Off | None = None
    logit_bias: Annotated[dict[str, float], msgspec.Meta(max_length=0)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=_MOST_LOGPROBS)] | None = None
    max_tokens: Count | None = None
    min_p: float | None = None
    n: Count | None = None
    presence_penalty: Off | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: Annotated[str, msgspec.Meta(max_length=0)] | None = None
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
        num_prompt_tokens: of all prompts, each counted once.
        stop: texts that end a sequence.
        num_alternatives: how many tokens to tell of at each place; None: nothing of probabilities.
        echo: whether the prompt is part of the answer.
        stream: whether the answer comes in pieces.
        include_usage: whether such an answer ends with the numbers of tokens.
    """

    requests: list[Request]
    prompts: list[str]
    num_prompt_tokens: int
    stop: Sequence[str]
    num_alternatives: int | None
    echo: bool
    stream: bool
    include_usage: bool


def read_body(data: bytes) -> CompletionBody:
    """Returns what a request's JSON says.

    Raises:
        ApiError: it is not JSON, or a field is unknown or of another type or range.
    """
    try:
        return msgspec.json.decode(data, type=CompletionBody)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        names = re.findall(r"\w+", path)
        unknown = re.search(r"unknown field `(.*)`", what)
        param = unknown[1] if unknown else names[0] if names else None
        raise ApiError(400, str(error), param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}") from error


def plan(body: CompletionBody, limits: Limits, tokenizer: Tokenizer) -> Plan:
    """Returns what to do for a request.

    Raises:
        ApiError: it asks for what this server cannot do.
    """
    if body.model is not None and body.model != limits.model:
        message = f"The model {body.model!r} is not here; the only one is {limits.model!r}."
        raise ApiError(404, message, param="model", code="model_not_found")
    num_sequences = body.n or 1
    if body.best_of not in (None, num_sequences):
        raise ApiError(400, "best_of must be equal to n.", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs are for new tokens only: not with echo.", param="logprobs")
    if body.stream_options and not body.stream:
        raise ApiError(400, "stream_options are for streams only.", param="stream_options")
    prompts = _prompts(body.prompt)
    if len(prompts) * num_sequences > limits.max_sequences:
        message = f"More than {limits.max_sequences} sequences at once are never possible here."
        raise ApiError(400, message, param="n" if len(prompts) == 1 else "prompt")
    sampling = _sampling(body, limits.sampling)
    max_new_tokens = body.max_tokens or limits.max_new_tokens
    seed = secrets.randbits(63) if body.seed is None else body.seed
    ids = [_prompt_ids(prompt, tokenizer) for prompt in prompts]
    longest = max(map(len, ids))
    if longest + max_new_tokens > limits.max_context:
        message = (
            f"{longest} tokens of the prompt and {max_new_tokens} new ones are more than the "
            f"{limits.max_context} that fit."
        )
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    num_alternatives = body.logprobs
    requests = [
        Request(
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            generator_seed=generator_seed(seed, number, sequence),
            # The engine tells the chosen token's probability only beside some other's.
            num_logprobs=0 if num_alternatives is None else max(1, num_alternatives),
        )
        for number, prompt_ids in enumerate(ids)
        for sequence in range(num_sequences)
    ]
    return Plan(
        requests,
        [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts],
        sum(map(len, ids)),
        _stop(body.stop) if body.stop is not None else limits.stop,
        num_alternatives,
        bool(body.echo),
        bool(body.stream),
        body.stream_options is not None and body.stream_options.include_usage,
    )


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
    sampling = replace(default, **given)
    if wrong := out_of_range(sampling):
        name, possible = wrong
        raise ApiError(400, f"{name} must be {possible}.", param=name)
    return sampling


def _stop(given: str | list[str]) -> list[str]:
    stop = [given] if isinstance(given, str) else given
    fine = all(0 < len(text) <= _MOST_STOP_CHARACTERS for text in stop)
    if len(stop) > _MOST_STOPS or not fine:
        message = f"At most {_MOST_STOPS} texts of 1 to {_MOST_STOP_CHARACTERS} characters."
        raise ApiError(400, message, param="stop")
    return stop
