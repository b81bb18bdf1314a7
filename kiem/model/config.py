"""Configuration of a Gemma 3 text model: shapes by name, and config.json as transformers has it."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kiem.core.errors import ExitCode, UserError, bad_option, not_found
from kiem.core.json_input import convert, read_json, shown

CONFIG_FILE = "config.json"
# The fix and exit code of errors about a folder that does not hold a Gemma 3 text model.
NOT_A_MODEL: dict[str, Any] = {
    "fix": "Name a folder with config.json and model.safetensors of a Gemma 3 text model, such as "
    "the final_model/ of a run.",
    "exit_code": ExitCode.NOT_A_MODEL,
}
GEMMA_VOCABULARY = 262_144
GEMMA3_1B_PARAMETERS = 999_885_952
GEMMA3_270M_PARAMETERS = 268_098_176


_Tokens = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
_Heads = Annotated[int, msgspec.Meta(ge=1, le=1 << 10)]
# What the rotary angles and the attention's scale are computed from, in fp32.
_Base = (
    Annotated[int, msgspec.Meta(ge=1, le=10**12)] | Annotated[float, msgspec.Meta(ge=1, le=1e12)]
)


@dataclass(frozen=True)
class Gemma3Config:
    """The shape of a Gemma 3 text model; names as in config.json, defaults are gemma3-1b's.

    The ranges are those that config.json may have, far beyond any Gemma.

    Attributes:
        vocab_size: rows of the embedding, which is also the output layer.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, each shared by several query heads.
        head_dim: width of a head.
        sliding_window: how many tokens, itself included, a token sees in a sliding layer.
        sliding_window_pattern: every n-th layer attends to all tokens, the others slide.
        query_pre_attn_scalar: queries are multiplied by this to the power -1/2.
        rope_theta: base of the rotary angles of full layers.
        rope_local_base_freq: base of the rotary angles of sliding layers.
        max_position_embeddings: longest text the model is meant for, in tokens.
        rms_norm_eps: added to the mean square in norms.
    """

    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)] = GEMMA_VOCABULARY
    hidden_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 17)] = 1152
    intermediate_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 6912
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 26
    num_attention_heads: _Heads = 4
    num_key_value_heads: _Heads = 1
    head_dim: Annotated[int, msgspec.Meta(ge=2, le=1 << 12, multiple_of=2)] = 256
    sliding_window: _Tokens = 512
    sliding_window_pattern: _Tokens = 6
    query_pre_attn_scalar: _Base = 256
    rope_theta: _Base = 1_000_000.0
    rope_local_base_freq: _Base = 10_000.0
    max_position_embeddings: _Tokens = 32_768
    rms_norm_eps: Annotated[float, msgspec.Meta(ge=1e-12, le=1)] = 1e-6

    def is_sliding(self, layer: int) -> bool:
        """Says whether layer number `layer`, counted from 0, has a sliding window."""
        return (layer + 1) % self.sliding_window_pattern != 0

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer, in transformers' words."""
        layers = range(self.num_hidden_layers)
        return ["sliding_attention" if self.is_sliding(n) else "full_attention" for n in layers]

    def num_parameters(self) -> int:
        """Returns the number of trainable values, the tied embedding counted once."""
        return self.vocab_size * self.hidden_size + self.num_layer_parameters()

    def num_layer_parameters(self) -> int:
        """Returns the same without the embedding: what the laws of size call N."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys) + 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 4 * self.hidden_size
        return self.num_hidden_layers * layer + self.hidden_size


def family_shape(width: int) -> Gemma3Config:
    """Returns the shape of a width in the family of small models, for Gemma's vocabulary.

    micro and nano are its members of width 128 and 256, the rungs of `kiem ladder` others. 6 layers
    for 256 of width, and no fewer; MLPs of 4 widths; 4 query heads that share keys and values, each
    a quarter as wide as the residual stream. 270m and 1b are near it, but not in it: there the
    family has 15 and 27 layers, not 18 and 26; the MLPs of 270m have 3.2 widths and those of 1b 6,
    and the heads of 270m are wider, by 256 to 160.

    Args:
        width: of the residual stream, a multiple of 32.
    """
    head_dim = min(256, width // 4)
    return Gemma3Config(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=max(6, round(6 * width / 256)),
        head_dim=head_dim,
        sliding_window=min(512, width),
        query_pre_attn_scalar=head_dim,
    )


PRESETS = {
    "gemma3-1b": Gemma3Config(),
    "gemma3-270m": Gemma3Config(hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "gemma3-nano": family_shape(256),
    "gemma3-micro": family_shape(128),
}
CUSTOM = "gemma3-custom"
_FAMILY_WIDTHS = range(32, 1184, 32)
_FAMILY_NAME = re.compile(r"gemma3-([0-9]{1,3}(?:\.[0-9]{1,4})?)m")
# A shape that is slightly off trains well and loads nowhere.
assert PRESETS["gemma3-1b"].num_parameters() == GEMMA3_1B_PARAMETERS
assert PRESETS["gemma3-270m"].num_parameters() == GEMMA3_270M_PARAMETERS


def shape_of(name: str) -> Gemma3Config:
    """Returns the shape of a name, for Gemma's vocabulary.

    Args:
        name: a preset, or gemma3-<N>m: of the family of small models the one whose number of
            parameters without the embedding is nearest to N million.

    Raises:
        UserError: there is no such shape.
    """
    if name in PRESETS:
        return PRESETS[name]
    shapes = [family_shape(width) for width in _FAMILY_WIDTHS]
    sizes = [shape.num_layer_parameters() / 1e6 for shape in shapes]
    found = _FAMILY_NAME.fullmatch(name)
    wanted = float(found[1]) if found else 0.0
    if not sizes[0] / 1.1 <= wanted <= sizes[-1] * 1.1:
        what = f"{name!r} is not possible"
        fix = f"Give one of {', '.join(PRESETS)}, or gemma3-<N>m with N from 0.1 to {sizes[-1]:.0f}"
        fix += ": N million parameters beside the vocabulary's, such as gemma3-20m."
        raise bad_option("--model", what, fix)
    return min(zip(sizes, shapes, strict=True), key=lambda pair: abs(pair[0] / wanted - 1))[1]


def sizes() -> list[str]:
    """Returns the names of all shapes, of the family and the presets, by parameters in layers."""
    shapes = [*PRESETS.values(), *(family_shape(width) for width in _FAMILY_WIDTHS)]
    shapes.sort(key=Gemma3Config.num_layer_parameters)
    return list(dict.fromkeys(name_of(shape) for shape in shapes))


def preset(name: str, vocab_size: int) -> Gemma3Config:
    """Returns a named shape with a vocabulary of `vocab_size` rows; errors as of `shape_of`."""
    return replace(shape_of(name), vocab_size=vocab_size)


def name_of(config: Gemma3Config) -> str:
    """Returns the name of the shape, whatever its vocabulary, with which `shape_of` finds it.

    CUSTOM if it is neither a preset nor in the family.
    """
    shape = replace(config, vocab_size=GEMMA_VOCABULARY)
    for name, known in PRESETS.items():
        if known == shape:
            return name
    is_member = config.hidden_size in _FAMILY_WIDTHS and shape == family_shape(config.hidden_size)
    return f"gemma3-{config.num_layer_parameters() / 1e6:.3g}m" if is_member else CUSTOM


# Written as they are, and required when read: another value means another architecture.
_FIXED = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "tie_word_embeddings": True,
}
_FIXED_LATER = {"use_bidirectional_attention": False}  # only in newer files


class _Rope(msgspec.Struct):
    """The rotary angles of a kind of layer; scaled ones are not supported."""

    rope_theta: _Base | None = None
    rope_type: Literal["default"] | None = None
    type: Literal["default"] | None = None  # its earlier name
    partial_rotary_factor: Annotated[float, msgspec.Meta(ge=1, le=1)] | None = None


class _RopeParameters(msgspec.Struct, forbid_unknown_fields=True):
    full_attention: _Rope = msgspec.field(default_factory=_Rope)
    sliding_attention: _Rope = msgspec.field(default_factory=_Rope)


class _Spellings(msgspec.Struct):
    """What versions of transformers write in different ways, or leave out."""

    sliding_window_pattern: _Tokens | None = None
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    rope_theta: _Base = Gemma3Config.rope_theta
    rope_local_base_freq: _Base = Gemma3Config.rope_local_base_freq
    rope_scaling: _Rope | None = None
    rope_parameters: _RopeParameters = msgspec.field(default_factory=_RopeParameters)


def describe(config: Gemma3Config, dtype: str) -> dict[str, Any]:
    """Returns the content of config.json without the tokenizer's ids.

    It has both spellings of what transformers renamed between 4.50 and 5.
    """
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **_FIXED,
        **vars(config),
        "layer_types": config.layer_types,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def read_config(folder: Path) -> Gemma3Config:
    """Returns the shape that a model directory's config.json describes.

    Raises:
        UserError: there is no config.json, it is not that of a Gemma 3 text model, or a value is
            out of its range; names the key.
    """
    check_folder(folder)
    path = folder / CONFIG_FILE
    # The architecture: first its name, then what else tells it from others.
    description = read_json(path, dict[str, Any], **NOT_A_MODEL)
    if description.get("model_type") != _FIXED["model_type"]:
        kind = shown(description.get("model_type"))
        raise not_a_model(path, f"not a Gemma 3 text model (model_type is {kind})")
    for name, value in (_FIXED | _FIXED_LATER).items():
        found = description.get(name, value)
        if found != value and not (found is None and value is False):
            raise not_a_model(path, f"{name} = {shown(found)} is not supported")
    # The shape: types and ranges, then how values relate to each other.
    raw = convert(description, _Spellings, where=str(path), **NOT_A_MODEL)
    pattern, layer_types = raw.sliding_window_pattern, raw.layer_types
    if pattern is None and layer_types is not None:
        pattern = [*layer_types, "full_attention"].index("full_attention") + 1
    rope = raw.rope_parameters
    description |= {
        "sliding_window_pattern": pattern or Gemma3Config.sliding_window_pattern,
        "rope_theta": rope.full_attention.rope_theta or raw.rope_theta,
        "rope_local_base_freq": rope.sliding_attention.rope_theta or raw.rope_local_base_freq,
    }
    for field in fields(Gemma3Config):
        if field.name not in description:
            raise not_a_model(path, f"it lacks {field.name}")
    config = convert(description, Gemma3Config, where=str(path), **NOT_A_MODEL)
    if config.num_attention_heads % config.num_key_value_heads != 0:
        heads = f"num_attention_heads = {config.num_attention_heads}"
        what = f"{heads} is no multiple of num_key_value_heads = {config.num_key_value_heads}"
        raise not_a_model(path, what)
    if layer_types not in (None, config.layer_types):
        num_layers = f"num_hidden_layers = {config.num_hidden_layers}"
        what = f"sliding_window_pattern = {config.sliding_window_pattern} and {num_layers}"
        raise not_a_model(path, f"layer_types does not follow {what}")
    return config


def check_folder(folder: Path) -> None:
    """Raises a UserError if there is no such folder."""
    try:
        is_there = folder.is_dir()
    except OSError:  # such as a name of 300 characters
        is_there = False
    if not is_there:
        fix = "Name the final_model/ folder of a run, or a Hub id."
        raise not_found(str(folder), "no such model directory", fix)


def not_a_model(where: Path, what: str) -> UserError:
    """Returns the error for a folder that does not hold a Gemma 3 text model."""
    return UserError(what, where=str(where), **NOT_A_MODEL)
