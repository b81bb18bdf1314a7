"""Gives a model on the CPU what makes decoding fast: its weights in another form, fewer calls.

The model stays the one of kiem/model/gemma3.py: what many tokens at a time pass through is its own
code. A layer of it takes some 40 calls for a token; 26 layers of these take as long as reading half
the weights in int4. So one token a sequence passes a layer in one call.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kiem.inference.arena import Arena
from kiem.inference.kernels import Form, LayerKernel, Matrix, Product, load_kernels
from kiem.inference.quantize import KERNEL_DTYPES, EmbeddingWeights, Weights
from kiem.model.cache import LayerCache
from kiem.model.gemma3 import Context, Gemma3, Layer

# The kernels' vectors.
_VECTOR = 16


def prepare(model: Gemma3, quantize: Literal["none", "int8", "int4"]) -> None:
    """Gives a model on the CPU weights for inference, in place; with "none" they are not copied.

    Args:
        model: a model with weights in fp32 or bf16, which stays the precision of the activations.
        quantize: how.
    """
    stored: Form = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    form: Form = stored if quantize == "none" else quantize
    body = model.model
    arena = Arena()  # filled in the order in which a token reads
    for number, layer in enumerate(body.layers):
        assert isinstance(layer, Layer)
        has_kernels = not isinstance(load_kernels(), str) and model.dtype in KERNEL_DTYPES
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                weights = Weights(module.weight.detach(), form, model.dtype, arena)
                layer.set_submodule(name, weights)
                has_kernels &= weights.product is not None
        if has_kernels and model.config.head_dim % _VECTOR == 0:
            body.layers[number] = DecodingLayer(layer, model.dtype)
    embedding = EmbeddingWeights(body.embed_tokens.weight.detach(), form, model.dtype, arena)
    body.set_submodule("embed_tokens", embedding)


class DecodingLayer(nn.Module):
    """A layer that one token a sequence passes in one call."""

    def __init__(self, layer: Layer, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        attention, mlp = layer.self_attn, layer.mlp
        product = partial(Product, dtype=dtype, eps=layer.input_layernorm.eps)
        keys = _matrices(attention.k_proj)
        self._kernel = LayerKernel(
            (
                product(
                    [*_matrices(attention.q_proj), *keys, *_matrices(attention.v_proj)],
                    gain_before=layer.input_layernorm.weight,
                ),
                product(
                    _matrices(attention.o_proj), gain_after=layer.post_attention_layernorm.weight
                ),
                product(
                    _matrices(mlp.gate_proj, mlp.up_proj),
                    gain_before=layer.pre_feedforward_layernorm.weight,
                    is_gated=True,
                ),
                product(
                    _matrices(mlp.down_proj), gain_after=layer.post_feedforward_layernorm.weight
                ),
            ),
            (attention.q_norm.weight, attention.k_norm.weight),
            keys[0].num_rows // attention.head_dim,
            attention.scale,
        )

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """As the layer's own."""
        where = context.cached
        if cache is None or where is None or x.shape[1] > 1:
            return self.layer(x, context, cache)
        held = cache.keys, cache.values
        return self._kernel(x, context.rotary, held, where.positions, where.first_slot)


def _matrices(*modules: nn.Module) -> list[Matrix]:
    assert all(isinstance(module, Weights) for module in modules)
    return [module.matrix for module in modules if isinstance(module, Weights)]
