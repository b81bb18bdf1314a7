"""Gives a model on the CPU what makes decoding fast: its weights in another form, fewer calls.

The model stays the one of kiem/model/gemma3.py: what many tokens at a time pass through is its own
code. Only modules whose work is small and made of many calls are given a form of one call for few
tokens, since 26 layers of some 40 calls each take as long as reading half the weights in int4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kiem.inference.kernels import Form, attend, load_kernels, norm
from kiem.inference.quantize import KERNEL_DTYPES, MOST_TOKENS, EmbeddingWeights, Weights
from kiem.model.cache import LayerCache
from kiem.model.gemma3 import Attention, Context, Gemma3, RMSNorm


def prepare(model: Gemma3, quantize: Literal["none", "int8", "int4"]) -> None:
    """Gives a model on the CPU weights for inference, in place; with "none" they are not copied.

    Args:
        model: a model with weights in fp32 or bf16, which stays the precision of the activations.
        quantize: how.
    """
    stored: Form = "bf16" if model.dtype == torch.bfloat16 else "fp32"
    form: Form = stored if quantize == "none" else quantize
    body = model.model
    for layer in body.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                weights = Weights(module.weight.detach(), form, model.dtype)
                layer.set_submodule(name, weights)
    embedding = EmbeddingWeights(body.embed_tokens.weight.detach(), form, model.dtype)
    body.set_submodule("embed_tokens", embedding)
    widths = model.config.hidden_size, model.config.head_dim
    fits = model.dtype in KERNEL_DTYPES and all(width % 16 == 0 for width in widths)
    if not fits or isinstance(load_kernels(), str):
        return
    for layer in body.layers:
        for name, module in list(layer.named_children()):
            if isinstance(module, RMSNorm):
                layer.set_submodule(name, Norm(module))
            elif isinstance(module, Attention):
                layer.set_submodule(name, DecodingAttention(module))
    body.set_submodule("norm", Norm(body.norm))


class Norm(nn.Module):
    """An RMSNorm that takes one call for few tokens."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.norm = norm
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [B, T, D], normalized."""
        return norm(x, self.weight, self.norm.eps) if x.shape[1] <= MOST_TOKENS else self.norm(x)


class DecodingAttention(nn.Module):
    """Attention, all of which but the matrices is one call when there is one token a sequence."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        """As the attention's own."""
        whole = self.attention
        if cache is None or context.cached is None or x.shape[1] > 1:
            return whole(x, context, cache)
        slots = slice(context.cached.first_slot, context.cached.first_slot + len(x))
        mixed = attend(
            (whole.q_proj(x), whole.k_proj(x), whole.v_proj(x)),
            (whole.q_norm.weight, whole.k_norm.weight),
            context.rotary,
            (cache.keys[slots], cache.values[slots]),
            context.cached.positions,
            whole.q_norm.eps,
            whole.scale,
        )
        return whole.o_proj(mixed)
