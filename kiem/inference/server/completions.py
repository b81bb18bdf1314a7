"""Requests to /v1/completions, as OpenAI defines them, translated for the engine.

https://platform.openai.com/docs/api-reference/completions. Additional fields (top_k, min_p,
repetition_penalty) have vLLM's names.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kiem.config import Penalty, Share, Temperature, TopP
from kiem.inference.engine import Request
from kiem.inference.sampling import SamplingParams
from kiem.inference.server.errors import ApiError, shown
from kiem.tokenizer.tokenizer import Tokenizer

# A field that is not here is accepted with a value that asks for nothing: null, false, 0 or empty.
# For these, of OpenAI, vLLM and llama.cpp, that is another value beside null.
_OFF: dict[str, Any] = {
    **dict.fromkeys(("best_of", "length_penalty", "repeat_penalty", "tfs_z", "typical_p"), 1),
    **dict.fromkeys(("id_slot", "top_n_sigma"), -1),
    **dict.fromkeys(("add_special_tokens", "detokenize", "skip_special_tokens"), True),
    "spaces_between_special_tokens": True,
    "response_format": {"type": "text"},
}
# These may have any value, since they only adjust what is off. llama.cpp's clients send defaults.
_ADJUSTMENTS = """
cache_prompt dry_allowed_length dry_base dry_penalty_last_n dry_sequence_breakers dynatemp_exponent
guided_decoding_backend guided_whitespace_pattern mirostat_eta mirostat_tau repeat_last_n
xtc_threshold
"""

StopText = Annotated[str, Meta(min_length=1, max_length=256)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with every part
    include_obfuscation: bool = False  # OpenAI pads its stream with noise; kiem never does


class CompletionBody(msgspec.Struct):
    """The body of a request; None stands for the server's default."""

    prompt: str | list[str | int | list[int]]
    model: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_p: Share | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    repetition_penalty: Penalty | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    top_p: TopP | None = None
    user: str | None = None


@dataclass(frozen=True)
class ServerSettings:
    """What the server was started with.

    Attributes:
        model: the name that the model goes by.
        params: defaults for requests.
        max_context: most tokens of a prompt and its continuation together.
        max_sequences: most sequences that run or wait, of all requests together.
    """

    model: str
    params: SamplingParams
    max_context: int
    max_sequences: int


@dataclass(frozen=True)
class Completion:
    """A valid request.

    Attributes:
        body: its fields.
        requests: for the engine, the sequences of the first prompt first.
        prompts: the text of each prompt.
        prompt_ids: the tokens of each: of texts with <bos>, else those given.
        num_prompt_tokens: of all prompts, each counted once.
    """

    body: CompletionBody
    requests: list[Request]
    prompts: list[str]
    prompt_ids: list[list[int]]
    num_prompt_tokens: int


def parse_completion(data: bytes, settings: ServerSettings, tokenizer: Tokenizer) -> Completion:
    """Returns what a request asks for.

    Raises:
        ApiError: it is not valid, or asks for what this server cannot do.
    """
    # Read the fields.
    body = _read_body(data)
    if body.model not in (None, settings.model):
        message = f"The model {shown(body.model)} is not here; the only one is {settings.model}."
        raise ApiError(404, message, param="model", code="model_not_found")
    num_sequences = body.n or 1
    prompts = _prompts(body.prompt)
    if len(prompts) * num_sequences > settings.max_sequences:
        message = f"More than {settings.max_sequences} sequences at once are never possible here."
        raise ApiError(400, message, param="n" if len(prompts) == 1 else "prompt")
    params = _params(body, settings.params)

    # Encode the prompts.
    ids = [_prompt_ids(prompt, tokenizer) for prompt in prompts]
    longest = max(map(len, ids))
    if longest + params.max_new_tokens > settings.max_context:
        message = (
            f"{longest} tokens of the prompt and {shown(params.max_new_tokens)} new ones are more "
            f"than the {settings.max_context} that fit."
        )
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")

    # Make a request to the engine for each sequence.
    seed = secrets.randbits(63) if body.seed is None else body.seed
    requests = [
        Request(
            prompt_ids,
            params,
            seed,
            prompt_number,
            sequence,
            # The engine gives the chosen token's probability only with those of others.
            num_logprobs=0 if body.logprobs is None else max(1, body.logprobs),
            scores_prompt=bool(body.echo) and body.logprobs is not None,
        )
        for prompt_number, prompt_ids in enumerate(ids)
        for sequence in range(num_sequences)
    ]
    return Completion(
        body,
        requests,
        [p if isinstance(p, str) else tokenizer.decode(p) for p in prompts],
        [read if isinstance(p, str) else p for p, read in zip(prompts, ids, strict=True)],
        sum(map(len, ids)),
    )


def _read_body(data: bytes) -> CompletionBody:
    """Returns a request's JSON with types and ranges checked."""
    try:
        given = msgspec.json.decode(data, type=dict[str, Any])
        if given.get("logprobs") is False:  # as in OpenAI's API for chats
            del given["logprobs"]
        known = CompletionBody.__struct_fields__
        for name, value in given.items():
            if name not in known and not _is_off(name, value):
                message = f"This server cannot do {shown(name)}: {shown(value)}. Its fields are "
                raise ApiError(400, f"{message}{', '.join(known)}.", param=shown(name))
        return msgspec.convert(given, CompletionBody)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        names = re.findall(r"\w+", path)
        where = f"{path.strip('.`')}: " if names else ""
        raise ApiError(400, f"{where}{what}.", param=names[0] if names else None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not plain JSON: {error}") from error


def _is_off(name: str, value: Any) -> bool:
    """Returns whether a field that is not here asks for nothing."""
    if name in _OFF:
        return value is None or value == _OFF[name]
    return not value or name in _ADJUSTMENTS.split()


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
    kinds = set(map(type, given))
    if isinstance(given, str) or kinds == {int}:
        return [given]
    if kinds not in ({str}, {list}):
        message = "prompt must be a text, a list of texts, token ids, or a list of token ids."
        raise ApiError(400, message, param="prompt")
    return given


def _prompt_ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if not all(0 <= token < tokenizer.num_rows for token in prompt):
        message = f"Token ids are 0 to {tokenizer.num_rows - 1}."
        raise ApiError(400, message, param="prompt")
    return prompt if prompt[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *prompt]


def _params(body: CompletionBody, default: SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_k": 0 if body.top_k == -1 else body.top_k,  # as vLLM and llama.cpp say "all"
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "max_new_tokens": body.max_tokens,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
    }
    return replace(default, **{n: value for n, value in given.items() if value is not None})
