"""Causal attention with masks, and where a kernel needs none. Shapes:

B sequences in a batch    T tokens    S keys a query may see
H query heads             C head_dim
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kiem.compute.device import device_type

# Queries at a time on a CPU, whose kernels compute all that a mask hides. Fewer leave out more
# keys, but make the products small: on two cores in fp32, a layer of gemma3-1b with 1024 tokens and
# a window of 512 takes 57 ms forward and back with all at once, 40 with 256, 47 with 128.
_CPU_BLOCK = 256
# Not cuDNN's, which torch prefers from sm90 on: with masks and a head_dim of 256 its gradients are
# reported to be NaN (pytorch#196678).
_GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Of flash attention.
_MAX_HEAD_DIM, _HEAD_DIM_STEP = 256, 8


def has_varlen_kernel(x: Tensor, head_dim: int) -> bool:
    """Says whether `attend_documents` of kiem/compute/varlen.py does the attention of a model.

    Args:
        x: what a layer gets, on the model's device.
        head_dim: C.
    """
    if device_type(x) != "cuda" or head_dim > _MAX_HEAD_DIM or head_dim % _HEAD_DIM_STEP:
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    is_mixed = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_mixed else x.dtype
    return dtype == torch.bfloat16


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Returns the attention's output [B, H, T, C].

    Args:
        q: [B, H, T, C].
        k, v: [B, H, S, C].
        mask: bool [B or 1, 1, T, S], true where a query may look, or what to add to the scores;
            None for plain causal attention.
        scale: factor of the scores.
    """
    with sdpa_kernel(_GPU_KERNELS) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """Returns the attention's output [B, H, T, C], without most of what a sliding window hides.

    Args:
        q, k, v: [B, H, T, C].
        mask: bool [B or 1, 1, T, T], true where a query may look; None for plain causal attention.
        window: how many tokens, its own included, a query may see; None for all.
        scale: factor of the scores.
    """
    if mask is None:
        return attend_masked(q, k, v, None, scale)
    num_tokens = q.shape[2]
    block = _CPU_BLOCK if q.device.type == "cpu" else num_tokens
    parts = []
    for start in range(0, num_tokens, block):
        rows = slice(start, start + block)
        seen = slice(max(0, start - window) if window is not None else 0, start + block)
        parts.append(
            attend_masked(
                q[:, :, rows],
                k[:, :, seen],
                v[:, :, seen],
                mask[:, :, rows, seen],
                scale,
            )
        )
    return torch.cat(parts, 2)


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Returns which keys each query may see: not later ones, and no further back than the window.

    Args:
        query_positions: int64 [..., T].
        key_positions: int64 [..., S]; negative for empty entries of a cache.
        window: how many tokens, its own included, a query may see; None for all.

    Returns:
        bool [..., T, S].
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    seen = (distance >= 0) & (key_positions >= 0)[..., None, :]
    return seen & (distance < window) if window is not None else seen


def same_document(document_starts: Tensor, batch_size: int, num_tokens: int) -> Tensor:
    """Returns which tokens of each row belong to one document, bool [B, T, T].

    Args:
        document_starts: int32, as `Gemma3.forward` takes them.
        batch_size, num_tokens: B, T.
    """
    size, device = batch_size * num_tokens, document_starts.device
    positions = torch.arange(size, dtype=document_starts.dtype, device=device)
    document = torch.bucketize(positions, document_starts, right=True).view(batch_size, -1)  # B T
    return document[:, :, None] == document[:, None, :]


def repeat_kv(x: Tensor, num_heads: int) -> Tensor:
    """Gives keys or values [B, K, S, C] to all query heads, [B, H, S, C]; a view if K is 1.

    On CUDA, enable_gqa of scaled_dot_product_attention works only in kernels that take no mask or
    are slow.
    """
    return x[:, :, None].expand(-1, -1, num_heads // x.shape[1], -1, -1).flatten(1, 2)
