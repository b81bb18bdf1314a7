"""Fields of OpenAI's, vLLM's and llama.cpp's completions for which kiem has nothing.

Their clients send many of them with the value that switches them off: that is taken as what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kiem.inference.server.errors import ApiError, shown

# The values that mean "off", beside null.
_OFF: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "max_completion_tokens": (),
    "messages": (),
    "presence_penalty": (0,),
    "suffix": ("",),
    # vLLM's
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({},),
    "guided_regex": ("",),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structural_tag": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # llama.cpp's
    "cache_prompt": (False, True),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "id_slot": (-1,),
    "json_schema": (),
    "lora": ([],),
    "min_keep": (0,),
    "mirostat": (0,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0,),
    "n_predict": (),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "repeat_penalty": (1,),
    "response_fields": ([],),
    "return_progress": (False,),
    "return_tokens": (False,),
    "t_max_predict_ms": (0, -1),
    "tfs_z": (1,),
    "timings_per_token": (False,),
    "top_n_sigma": (-1,),
    "typ_p": (1,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
# They only adjust what is off, so any value is fine: clients of llama.cpp send their defaults.
_ADJUSTMENTS = {
    "dry_allowed_length",
    "dry_base",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "dynatemp_exponent",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "mirostat_eta",
    "mirostat_tau",
    "repeat_last_n",
    "xtc_threshold",
}
# What does the same or something like it here.
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


def without_foreign(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request but those that switch off what kiem does not have.

    Raises:
        ApiError: a field asks for such a thing.
    """
    for name, off in _OFF.items():
        value = given.get(name)
        if value is not None and value not in off:
            works = " or ".join(_json(each) for each in (*off, None))
            instead = f" See {_INSTEAD[name]}." if name in _INSTEAD else ""
            message = f"{name} is {shown(_json(value))}, which this server cannot do; "
            raise ApiError(400, f"{message}what works: {works}.{instead}", param=name)
    return {
        name: value
        for name, value in given.items()
        if name not in _OFF and name not in _ADJUSTMENTS
    }


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
