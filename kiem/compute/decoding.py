"""Gives a model on the CPU what makes decoding fast: its weights in another form, fewer calls.

The model stays the one of kiem/model/gemma3.py: what many tokens at a time pass through is its own
code. A layer of it takes some 40 calls for a token; 26 layers of these take as long as reading half
the weights in int4. So one token a sequence passes all layers in one call.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kiem.compute.arena import Arena
from kiem.compute.kernels import Form, LayerKernel, LayerKernels, Matrix, Product, load_kernels
from kiem.compute.quantize import KERNEL_DTYPES, EmbeddingWeights, Weights
from kiem.model.cache import CachePass
from kiem.model.gemma3 import Gemma3, Layer, rotary_frequencies

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
    has_kernels = not isinstance(load_kernels(), str) and model.dtype in KERNEL_DTYPES
    for layer in body.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                weights = Weights(module.weight.detach(), form, model.dtype, arena)
                layer.set_submodule(name, weights)
                has_kernels &= weights.product is not None
    embedding = EmbeddingWeights(body.embed_tokens.weight.detach(), form, model.dtype, arena)
    body.set_submodule("embed_tokens", embedding)
    if has_kernels and model.config.head_dim % (2 * _VECTOR) == 0:
        model.run_token = TokenPass(model)


class TokenPass:
    """What `Gemma3.hidden_states` does with one token a sequence, in one call."""

    def __init__(self, model: Gemma3):
        config, norm = model.config, model.model.norm
        self._embedding = model.model.embed_tokens
        # Gemma rounds the scale to the embedding's precision.
        self._scale = torch.tensor(config.hidden_size**0.5, dtype=model.dtype)
        thetas = config.rope_theta, config.rope_local_base_freq
        frequencies = [
            rotary_frequencies(config.head_dim, theta, norm.weight.device) for theta in thetas
        ]
        self._frequencies = torch.stack(frequencies)[:, None]  # 2 1 C/2
        layers = [_layer_kernel(layer, model.dtype) for layer in model.model.layers]
        self._layers = LayerKernels(layers, norm.weight, norm.eps)

    def __call__(self, ids: Tensor, where: CachePass) -> Tensor:
        """Returns the normed output of the last layer [B, 1, D] of tokens int64 [B, 1]."""
        x = self._embedding(ids) * self._scale  # B 1 D
        angles = where.positions.float() * self._frequencies  # 2 B C/2
        rotary = angles.cos(), angles.sin()
        self._layers(x, rotary, where.cache.layers, where.positions, where.first_slot)
        return x


def _layer_kernel(layer: nn.Module, dtype: torch.dtype) -> LayerKernel:
    assert isinstance(layer, Layer)
    attention, mlp = layer.self_attn, layer.mlp
    product = partial(Product, dtype=dtype, eps=layer.input_layernorm.eps)
    keys = _matrices(attention.k_proj)
    products = (
        product(
            [*_matrices(attention.q_proj), *keys, *_matrices(attention.v_proj)],
            gain_before=layer.input_layernorm.weight,
        ),
        product(_matrices(attention.o_proj), gain_after=layer.post_attention_layernorm.weight),
        product(
            _matrices(mlp.gate_proj, mlp.up_proj),
            gain_before=layer.pre_feedforward_layernorm.weight,
            is_gated=True,
        ),
        product(_matrices(mlp.down_proj), gain_after=layer.post_feedforward_layernorm.weight),
    )
    gains = attention.q_norm.weight, attention.k_norm.weight
    return LayerKernel(products, gains, keys[0].num_rows // attention.head_dim, attention.scale)


def _matrices(*modules: nn.Module) -> list[Matrix]:
    assert all(isinstance(module, Weights) for module in modules)
    return [module.matrix for module in modules if isinstance(module, Weights)]
