"""Attention within documents that stand one after the other, by flash attention on a GPU.

Importing this loads torch's compiler, which takes seconds. Shapes:

    N tokens of all documents    H query heads    K key/value heads    C head_dim
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 shares keys and values among query heads without being told.
_SHARES_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_OPTIONS: dict[str, Any] = {"enable_gqa": True} if _SHARES_KEYS else {}


def attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Returns the output of causal attention (arXiv:2307.08691) within documents, [N, H, C].

    Args:
        q: [N, H, C], in bf16.
        k, v: [N, K, C].
        starts: int32 [documents + 1], where documents begin, and N.
        longest: no document has more tokens.
        window: how many tokens, its own included, a query may see; None for all.
        scale: factor of the scores.
    """
    # The kernel counts the tokens before a query's own; -1 for all.
    num_before = window - 1 if window is not None and window < longest else -1
    out = varlen_attn(
        *(q, k, v, starts, starts, longest, longest),
        scale=scale,
        window_size=(num_before, 0),
        **_OPTIONS,
    )
    assert isinstance(out, Tensor)
    return out
