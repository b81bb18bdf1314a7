"""Fields of OpenAI's, vLLM's and llama.cpp's completions that kiem does not support.

Clients send many of them with the value that switches the feature off, which is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kiem.inference.server.errors import ApiError, shown

_NULL_ONLY = """
cache_salt json_schema kv_transfer_params max_completion_tokens messages n_predict prompt_embeds
prompt_logprobs request_id structural_tag structured_outputs truncate_prompt_tokens
"""
_ZERO = """
dry_multiplier dynatemp_range frequency_penalty min_keep min_tokens mirostat n_discard n_indent
n_keep n_probs presence_penalty priority xtc_probability
"""
_FALSE = """
early_stopping ignore_eos include_stop_str_in_output post_sampling_probs return_progress
return_token_ids return_tokens return_tokens_as_token_ids timings_per_token use_beam_search
"""
_TRUE = "add_special_tokens detokenize skip_special_tokens spaces_between_special_tokens"
_EMPTY_LIST = """
allowed_token_ids bad_words guided_choice logits_processors lora response_fields stop_token_ids
"""
# The values that switch each field off, beside null.
_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_NULL_ONLY.split(), ()),
    **dict.fromkeys(_ZERO.split(), (0,)),
    **dict.fromkeys(("length_penalty", "repeat_penalty", "tfs_z", "typ_p", "typical_p"), (1,)),
    **dict.fromkeys(("id_slot", "top_n_sigma"), (-1,)),
    **dict.fromkeys(_FALSE.split(), (False,)),
    **dict.fromkeys(_TRUE.split(), (True,)),
    **dict.fromkeys(("grammar", "guided_grammar", "guided_regex", "suffix"), ("",)),
    **dict.fromkeys(_EMPTY_LIST.split(), ([],)),
    **dict.fromkeys(("guided_json", "logit_bias", "vllm_xargs"), ({},)),
    "cache_prompt": (False, True),
    "response_format": ({"type": "text"},),
    "t_max_predict_ms": (0, -1),
}
# Any value is accepted: they only adjust features that are off. llama.cpp's clients send defaults.
_ADJUSTMENTS = """
dry_allowed_length dry_base dry_penalty_last_n dry_sequence_breakers dynatemp_exponent
guided_decoding_backend guided_whitespace_pattern mirostat_eta mirostat_tau repeat_last_n
xtc_threshold
"""
_INSTEAD = {
    "frequency_penalty": "repetition_penalty",
    "ignore_eos": "max_tokens, which is an upper limit",
    "max_completion_tokens": "max_tokens",
    "messages": "prompt: this is a base model, which continues texts",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "presence_penalty": "repetition_penalty",
    "prompt_logprobs": "echo with logprobs",
    "repeat_penalty": "repetition_penalty",
    "stop_token_ids": "stop",
}


def without_unsupported(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request without those that switch off an unsupported feature.

    Raises:
        ApiError: a field asks for such a feature.
    """
    for name, off in _OFF.items():
        value = given.get(name)
        if value is not None and value not in off:
            works = " or ".join(_json(each) for each in (*off, None))
            instead = f" See {_INSTEAD[name]}." if name in _INSTEAD else ""
            message = f"{name} is {shown(_json(value))}, which this server cannot do; "
            raise ApiError(400, f"{message}what works: {works}.{instead}", param=name)
    known = {*_OFF, *_ADJUSTMENTS.split()}
    return {name: value for name, value in given.items() if name not in known}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
