"""Fast decoding on a CPU: a model's weights for the kernels of kiem/compute, and one call a token.

Prompts pass through the model's own code. A layer of that takes some 40 calls for a token; 26
layers of these take as long as reading half the weights in int4. So one token a sequence passes all
layers in one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kiem.compute.kernels import (
    BITS,
    Format,
    Layer,
    LayerCache,
    TextModel,
    Weight,
    describe_linear,
    kernels,
    load_kernels,
)
from kiem.compute.quantize import KernelEmbedding, KernelLinear, KernelMLP, LargePages, pack_weight
from kiem.model.cache import CachePass
from kiem.model.gemma3 import DecoderLayer, Gemma3
from kiem.model.rotary import rotary_frequencies

_HEAD_DIM_STEP = 32  # both halves of a head are whole vectors


def use_kernels(
    model: Gemma3,
    quantize: Literal["none", "int8", "int4"],
    dtype: torch.dtype | None = None,
) -> str | None:
    """Gives a model on the CPU weights and a decoder for the kernels, in place.

    Args:
        model: the model.
        quantize: how; "none" keeps the matrices themselves, those in bf16 also for activations in
            fp32, which multiply them exactly.
        dtype: of the activations, fp32 or bf16; None: as the weights if they are bf16, else fp32.

    Returns:
        Why it cannot be done, if so: the model is then unchanged.
    """
    found = load_kernels()
    if isinstance(found, str):
        return found
    kept = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
    stored: Format = "bf16" if kept == torch.bfloat16 else "fp32"
    format: Format = stored if quantize == "none" else quantize
    step = 128 if format in BITS else 32  # the kernels take so many columns at once
    if any(p.shape[1] % step for p in model.parameters() if p.ndim == 2):
        return f"its widths are not all multiples of {step}"
    pages = LargePages()
    use_packed(model, dtype or kept, lambda _, weight: pack_weight(weight.to(kept), format, pages))
    return None


def use_packed(model: Gemma3, dtype: torch.dtype, packed: Callable[[str, Tensor], Weight]) -> None:
    """Gives a model matrices for the kernels and a decoder, in place.

    Args:
        model: the model.
        dtype: of the activations, fp32 or bf16.
        packed: called with the name and the weight of each matrix, in the order in which a token
            reads them.
    """
    for number, layer in enumerate(model.model.layers):
        linears = {}
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                weight = packed(f"layers.{number}.{name}", module.weight.detach())
                linears[name] = KernelLinear(weight, dtype)
                layer.set_submodule(name, linears[name])
        mlp = (linears[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
        layer.set_submodule("mlp", KernelMLP(*mlp))
    weight = packed("embed_tokens.linear", model.model.embed_tokens.weight.detach())
    model.model.set_submodule("embed_tokens", KernelEmbedding(weight, dtype))
    for norm in model.parameters():  # what is left
        norm.data = norm.data.to(dtype)
    if model.config.head_dim % _HEAD_DIM_STEP == 0:
        model.decoder = Decoder(model)


class Decoder:
    """What `Gemma3.hidden_states` does with one token a sequence, in one call."""

    def __init__(self, model: Gemma3):
        config, norm = model.config, model.model.norm
        self._embedding = model.model.embed_tokens
        self._scale = model.embedding_scale(norm.weight.device)
        thetas = config.rope_theta, config.rope_local_base_freq
        frequencies = [
            rotary_frequencies(config.head_dim, theta, norm.weight.device) for theta in thetas
        ]
        self._frequencies = torch.stack(frequencies)[:, None]  # 2 1 C/2
        layers = [_layer(layer, model) for layer in model.model.layers]
        self._layers = (Layer * len(layers))(*layers)
        address = ctypes.addressof(self._layers)
        self._model = TextModel(address, norm.weight.data_ptr(), len(layers), norm.eps)
        self._kept = [*model.parameters(), *model.buffers()]  # structs have only their addresses

    def __call__(self, ids: Tensor, where: CachePass) -> Tensor:
        """Returns the normed output of the last layer [B, 1, D] of tokens int64 [B, 1]."""
        x = self._embedding(ids) * self._scale  # B 1 D
        angles = where.positions.float() * self._frequencies  # 2 B C/2
        caches = (LayerCache * len(self._layers))(
            *(
                LayerCache(
                    layer.keys.data_ptr(),
                    layer.values.data_ptr(),
                    layer.keys.shape[2],
                    layer.is_sliding,
                )
                for layer in where.cache.layers
            )
        )
        tensors = x, angles.cos(), angles.sin(), where.positions
        pointers = (tensor.data_ptr() for tensor in tensors)
        kernels().kiem_layers(
            ctypes.byref(self._model), caches, *pointers, len(x), where.first_slot
        )
        return x


def _layer(layer: nn.Module, model: Gemma3) -> Layer:
    assert isinstance(layer, DecoderLayer)
    config, attention, mlp = model.config, layer.self_attn, layer.mlp
    linear = partial(describe_linear, dtype=model.dtype, eps=config.rms_norm_eps)
    qkv = linear(
        _weights(attention.q_proj, attention.k_proj, attention.v_proj),
        norm_before=layer.input_layernorm.weight,
    )
    o_proj = linear(_weights(attention.o_proj), norm_after=layer.post_attention_layernorm.weight)
    gate_up = linear(
        _weights(mlp.gate_proj, mlp.up_proj),
        norm_before=layer.pre_feedforward_layernorm.weight,
        is_gated=True,
    )
    down = linear(_weights(mlp.down_proj), norm_after=layer.post_feedforward_layernorm.weight)
    return Layer(
        *(qkv, o_proj, gate_up, down),
        attention.q_norm.weight.data_ptr(),
        attention.k_norm.weight.data_ptr(),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        attention.scale,
    )


def _weights(*modules: nn.Module) -> list[Weight]:
    assert all(isinstance(module, KernelLinear) for module in modules)
    return [module.packed for module in modules if isinstance(module, KernelLinear)]
