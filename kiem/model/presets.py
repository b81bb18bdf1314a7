"""Shapes of Gemma 3 text models, and the names they go by."""

from __future__ import annotations

from dataclasses import dataclass, replace

GEMMA_VOCABULARY = 262_144
GEMMA3_1B_PARAMETERS = 999_885_952
GEMMA3_270M_PARAMETERS = 268_098_176


@dataclass(frozen=True)
class Gemma3Config:
    """The shape of a Gemma 3 text model; names and defaults as in its config.json.

    Attributes:
        vocab_size: rows of the embedding, which is also the output layer.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward block.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, each shared by several query heads.
        head_dim: width of a head.
        sliding_window: how many tokens, itself included, a token sees in a sliding layer.
        sliding_window_pattern: every so-manyth layer attends to all tokens, the others slide.
        query_pre_attn_scalar: queries are multiplied by this to the power -1/2.
        rope_theta: base of the rotary angles of full layers.
        rope_local_base_freq: base of the rotary angles of sliding layers.
        max_position_embeddings: longest text the model is meant for, in tokens.
        rms_norm_eps: added to the mean square in norms.
    """

    vocab_size: int = GEMMA_VOCABULARY
    hidden_size: int = 1152
    intermediate_size: int = 6912
    num_hidden_layers: int = 26
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 256
    sliding_window: int = 512
    sliding_window_pattern: int = 6
    query_pre_attn_scalar: int = 256
    rope_theta: float = 1_000_000.0
    rope_local_base_freq: float = 10_000.0
    max_position_embeddings: int = 32_768
    rms_norm_eps: float = 1e-6

    def is_sliding(self, layer: int) -> bool:
        """Says whether layer number `layer`, counted from 0, has a sliding window."""
        return (layer + 1) % self.sliding_window_pattern != 0

    def num_parameters(self) -> int:
        """Returns the number of trainable values, the tied embedding counted once."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys) + 2 * self.head_dim
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        layer = attention + feed_forward + 4 * self.hidden_size
        embedding = self.vocab_size * self.hidden_size
        return embedding + self.num_hidden_layers * layer + self.hidden_size


PRESETS = {
    "gemma3-1b": Gemma3Config(),
    "gemma3-270m": Gemma3Config(hidden_size=640, intermediate_size=2048, num_hidden_layers=18),
    "gemma3-nano": Gemma3Config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        head_dim=64,
        sliding_window=256,
        query_pre_attn_scalar=64,
    ),
    "gemma3-micro": Gemma3Config(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        head_dim=32,
        sliding_window=128,
        query_pre_attn_scalar=32,
    ),
}

CUSTOM = "gemma3-custom"
_EXPECTED = {"gemma3-1b": GEMMA3_1B_PARAMETERS, "gemma3-270m": GEMMA3_270M_PARAMETERS}


def preset(name: str, vocab_size: int) -> Gemma3Config:
    """Returns a named shape with a vocabulary of `vocab_size` rows.

    The public Gemma models are checked against their published number of parameters: a shape that
    is slightly off trains well and loads nowhere.
    """
    shape = PRESETS[name]
    if name in _EXPECTED:
        count = replace(shape, vocab_size=GEMMA_VOCABULARY).num_parameters()
        assert count == _EXPECTED[name], f"{name} has {count} parameters"
    return replace(shape, vocab_size=vocab_size)


def name_of(config: Gemma3Config) -> str:
    """Returns the name of the preset that has this shape, whatever its vocabulary, or CUSTOM."""
    for name, shape in PRESETS.items():
        if replace(shape, vocab_size=config.vocab_size) == config:
            return name
    return CUSTOM
