"""Decoding on a GPU: what `Gemma3.hidden_states` does with one token a sequence, in fewer kernels.

With one token, most kernels take longer to start than to compute. So matrices that multiply the
same vector are one matrix, queries and keys are normalized and turned together, and the query heads
that share keys are queries of one head. Shapes:

    B sequences    S keys a query may see    D hidden_size    F intermediate_size
    H query heads    K key/value heads    G = H / K    C head_dim
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.compute.attention import attend_masked
from kiem.model.cache import CachePass
from kiem.model.context import Context, make_contexts
from kiem.model.gemma3 import DecoderLayer, Gemma3, RMSNorm
from kiem.model.rotary import apply_rotary


def use_gpu_decoder(model: Gemma3) -> None:
    """Gives a model the decoder, in place; one that may be trained on stays as it is."""
    if model.decoder is None and not any(p.requires_grad for p in model.parameters()):
        with torch.no_grad():
            model.decoder = GpuDecoder(model)


class _Joined(NamedTuple):
    """What the parts of a layer have been joined to."""

    qkv: Tensor  # [(H + 2 K) C, D]
    gains: Tensor  # fp32 [H + K, C], of the norms of queries and keys
    gate_up: Tensor  # [2 F, D]


class GpuDecoder:
    """`Gemma3.hidden_states` of one token a sequence, up to rounding.

    The model's own weights become parts of the joined ones, and its norms keep their gains, so the
    weights must not change after this.
    """

    def __init__(self, model: Gemma3):
        self._config, self._text = model.config, model.model
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.gain = 1.0 + module.weight.float()
        self._joined = [self._join(layer) for layer in model.model.layers]
        self._scale = model.embedding_scale(model.model.norm.weight.device)

    def __call__(self, ids: Tensor, where: CachePass) -> Tensor:
        """Returns the normed output of the last layer [B, 1, D] of tokens int64 [B, 1]."""
        x = self._text.embed_tokens(ids) * self._scale  # B 1 D
        contexts = make_contexts(self._config, x, None, where)
        for number, layer in enumerate(self._text.layers):
            assert isinstance(layer, DecoderLayer)
            context = contexts[self._config.is_sliding(number)]
            y = self._attend(layer, number, layer.input_layernorm(x), context, where)
            x = x + layer.post_attention_layernorm(y)
            y = F.linear(layer.pre_feedforward_layernorm(x), self._joined[number].gate_up)
            gate, up = y.chunk(2, -1)  # B 1 F
            y = layer.mlp.down_proj(F.gelu(gate, approximate="tanh") * up)
            x = x + layer.post_feedforward_layernorm(y)
        return self._text.norm(x)

    def _attend(
        self, layer: DecoderLayer, number: int, x: Tensor, context: Context, where: CachePass
    ) -> Tensor:
        """Returns the output of a layer's attention, [B, 1, D]."""
        config, joined = self._config, self._joined[number]
        num_queries, num_keys = config.num_attention_heads, config.num_key_value_heads
        heads = F.linear(x, joined.qkv).unflatten(-1, (-1, config.head_dim))  # B 1 H+2K C
        qk, v = heads.split([num_queries + num_keys, num_keys], 2)
        qk = F.rms_norm(qk.float(), (config.head_dim,), None, config.rms_norm_eps) * joined.gains
        qk = apply_rotary(qk, context.rotary).to(x.dtype)
        q, k = qk.split([num_queries, num_keys], 2)
        k, v = where.cache.layers[number].extend(k.transpose(1, 2), v.transpose(1, 2), where)
        q = q.reshape(len(x), num_keys, -1, config.head_dim)  # B K G C
        y = attend_masked(q, k, v, context.mask, layer.self_attn.scale)  # B K G C
        return layer.self_attn.o_proj(y.reshape(len(x), 1, -1))

    def _join(self, layer: nn.Module) -> _Joined:
        assert isinstance(layer, DecoderLayer)
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.q_norm.gain is not None and attention.k_norm.gain is not None
        config = self._config
        gains = [
            attention.q_norm.gain.expand(config.num_attention_heads, -1),
            attention.k_norm.gain.expand(config.num_key_value_heads, -1),
        ]
        return _Joined(
            _join_weights(attention.q_proj, attention.k_proj, attention.v_proj),
            torch.cat(gains),
            _join_weights(mlp.gate_proj, mlp.up_proj),
        )


def _join_weights(*layers: nn.Linear) -> Tensor:
    """Returns the weights one below the other; those of the layers become parts of it."""
    joined = torch.cat([layer.weight for layer in layers])
    parts = joined.split([len(layer.weight) for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    return joined
