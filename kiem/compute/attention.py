"""Causal attention over whole sequences, without most of what a sliding window hides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries at a time on a CPU, whose kernels compute all that a mask hides. Fewer leave out more
# keys, but make the products small: on two cores in fp32, a layer of gemma3-1b with 1024 tokens and
# a window of 512 takes 57 ms forward and back with all at once, 40 with 256, 47 with 128.
_CPU_BLOCK = 256


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """Returns the attention's output [B, H, T, C].

    Args:
        q, k, v: [B, H, T, C].
        mask: bool [B or 1, 1, T, T], true where a query may look; None for plain causal attention.
        window: how many tokens, its own included, a query may see; None for all.
        scale: factor of the scores.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    num_tokens = q.shape[2]
    block = _CPU_BLOCK if q.device.type == "cpu" else num_tokens
    parts = []
    for start in range(0, num_tokens, block):
        rows = slice(start, start + block)
        seen = slice(max(0, start - window) if window is not None else 0, start + block)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, rows],
                k[:, :, seen],
                v[:, :, seen],
                attn_mask=mask[:, :, rows, seen],
                scale=scale,
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
