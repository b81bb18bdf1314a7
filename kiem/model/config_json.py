"""config.json of a Gemma 3 text model, as every transformers from 4.50 on writes and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from kiem.core.errors import ExitCode, UserError
from kiem.core.json_input import convert, read_json, shown
from kiem.model.presets import Gemma3Config

CONFIG_FILE = "config.json"
FIX = (
    "Name a folder with config.json and model.safetensors of a Gemma 3 text model, such as the "
    "final_model/ of a run."
)

# Written as they are, and required when read: another value means another architecture.
_FIXED = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "tie_word_embeddings": True,
}
# Of later versions; required where it is there.
_BIDIRECTIONAL = "use_bidirectional_attention"
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "query_pre_attn_scalar",
    "max_position_embeddings",
    "rms_norm_eps",
)
_DEFAULT_PATTERN = 6  # where neither sliding_window_pattern nor layer_types says it

_Tokens = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
_Heads = Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]
# What the rotary angles and the attention's scale are computed from, in fp32.
_Base = (
    Annotated[int, msgspec.Meta(ge=1, le=10**12)] | Annotated[float, msgspec.Meta(ge=1, le=1e12)]
)


class _Rope(msgspec.Struct):
    """The rotary angles of a kind of layer; scaled ones are not supported."""

    rope_theta: _Base | None = None
    rope_type: Literal["default"] | None = None
    type: Literal["default"] | None = None  # as it was called before
    partial_rotary_factor: Annotated[float, msgspec.Meta(ge=1, le=1)] | None = None


class _RopeParameters(msgspec.Struct, forbid_unknown_fields=True):
    full_attention: _Rope | None = None
    sliding_attention: _Rope | None = None


class _ConfigJson(msgspec.Struct):
    """Every key that is read, with its type and range; the ranges are far beyond any Gemma."""

    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    hidden_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 17)]
    intermediate_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    num_attention_heads: _Heads
    num_key_value_heads: _Heads
    head_dim: Annotated[int, msgspec.Meta(ge=2, le=1 << 12, multiple_of=2)]
    sliding_window: _Tokens
    query_pre_attn_scalar: _Base
    max_position_embeddings: _Tokens
    rms_norm_eps: Annotated[float, msgspec.Meta(ge=1e-12, le=1)]
    sliding_window_pattern: _Tokens | None = None
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    rope_theta: _Base | None = None
    rope_local_base_freq: _Base | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _RopeParameters | None = None


def describe(config: Gemma3Config, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what config.json says of a model, but for the tokenizer's ids."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **_FIXED,
        **{name: getattr(config, name) for name in _SHAPE},
        # Both spellings of the same facts: transformers changed them between 4.50 and 5.
        "sliding_window_pattern": config.sliding_window_pattern,
        "layer_types": _layer_types(config),
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_base_freq,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_config(folder: Path) -> Gemma3Config:
    """Returns the shape that a model directory's config.json describes.

    Raises:
        UserError: there is no config.json, it is not that of a Gemma 3 text model, or a value is
            out of its range; names the key.
    """
    path = folder / CONFIG_FILE
    check_folder(folder)
    description = read_json(path, dict[str, Any], fix=FIX, exit_code=ExitCode.NOT_A_MODEL)
    if description.get("model_type") != _FIXED["model_type"]:
        kind = shown(description.get("model_type"))
        raise not_a_model(path, f"not a Gemma 3 text model (model_type is {kind})")
    for name, value in {**_FIXED, _BIDIRECTIONAL: False}.items():
        found = description.get(name, value)
        if found != value and not (found is None and value is False):
            raise not_a_model(path, f"{name} = {shown(found)} is not supported")
    raw = convert(
        description, _ConfigJson, where=str(path), fix=FIX, exit_code=ExitCode.NOT_A_MODEL
    )
    if raw.num_attention_heads % raw.num_key_value_heads != 0:
        heads = f"num_attention_heads = {raw.num_attention_heads}"
        what = f"{heads} is no multiple of num_key_value_heads = {raw.num_key_value_heads}"
        raise not_a_model(path, what)
    full, sliding = _rope_bases(raw)
    config = Gemma3Config(
        **{name: getattr(raw, name) for name in _SHAPE},
        sliding_window_pattern=raw.sliding_window_pattern or _pattern(raw),
        rope_theta=full,
        rope_local_base_freq=sliding,
    )
    _check_layer_types(raw.layer_types, config, path)
    return config


def check_folder(folder: Path) -> None:
    """Raises a UserError if there is no such folder."""
    try:
        is_there = folder.is_dir()
    except OSError:  # such as a name of 300 characters
        is_there = False
    if not is_there:
        raise UserError(
            "no such model directory",
            where=str(folder),
            fix="Name the final_model/ folder of a run, or a Hub id.",
            exit_code=ExitCode.NOT_FOUND,
        )


def _check_layer_types(layer_types: Sequence[str] | None, config: Gemma3Config, path: Path) -> None:
    if layer_types is None or layer_types == _layer_types(config):
        return
    num_layers, pattern = config.num_hidden_layers, config.sliding_window_pattern
    what = f"layer_types does not follow sliding_window_pattern = {pattern}"
    if len(layer_types) != num_layers:
        what = f"layer_types has {len(layer_types)} entries, but num_hidden_layers = {num_layers}"
    raise not_a_model(path, what)


def not_a_model(where: Path, what: str) -> UserError:
    """Returns the error for a folder that does not hold a Gemma 3 text model."""
    return UserError(what, where=str(where), fix=FIX, exit_code=ExitCode.NOT_A_MODEL)


def _pattern(raw: _ConfigJson) -> int:
    """Returns every how-manyth layer attends to all tokens, for want of sliding_window_pattern."""
    if raw.layer_types is None:
        return _DEFAULT_PATTERN
    if "full_attention" not in raw.layer_types:
        return raw.num_hidden_layers + 1
    return raw.layer_types.index("full_attention") + 1


def _rope_bases(raw: _ConfigJson) -> tuple[float, float]:
    """Returns the bases of the rotary angles of full and sliding layers, in whichever spelling."""
    rope = raw.rope_parameters or _RopeParameters()
    full, sliding = rope.full_attention or _Rope(), rope.sliding_attention or _Rope()
    return (
        full.rope_theta or raw.rope_theta or Gemma3Config.rope_theta,
        sliding.rope_theta or raw.rope_local_base_freq or Gemma3Config.rope_local_base_freq,
    )


def _layer_types(config: Gemma3Config) -> list[str]:
    layers = range(config.num_hidden_layers)
    return ["sliding_attention" if config.is_sliding(n) else "full_attention" for n in layers]
