"""What the layers of a forward pass share: positions, and who sees whom. Shapes:

B sequences in a batch    T tokens    S keys a query may see    D hidden_size
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kiem.compute.attention import causal_mask, has_varlen_kernel, same_document
from kiem.model.cache import CachePass
from kiem.model.config import Gemma3Config
from kiem.model.rotary import Rotary, rotary_angles


class Context(NamedTuple):
    """What all layers of one kind (sliding or full) share in one forward pass.

    Attributes:
        rotary: the angles at this pass's positions.
        window: how many tokens, its own included, a query may see; None for all.
        mask: bool [B or 1, 1, T, S], true where a query may look; None for plain causal attention.
            With a cache on a GPU it is what to add to the scores, 0 or -inf.
        document_starts: of `Gemma3.forward`, for the kernel that takes them instead of a mask.
        cached: where the tokens go in the cache, if there is one.
    """

    rotary: Rotary
    window: int | None
    mask: Tensor | None = None
    document_starts: Tensor | None = None
    cached: CachePass | None = None


def make_contexts(
    config: Gemma3Config, x: Tensor, document_starts: Tensor | None, cached: CachePass | None
) -> tuple[Context, Context]:
    """Returns the contexts of full and of sliding layers.

    Args:
        config: the model's shape.
        x: [B, T, D], what the first layer gets.
        document_starts, cached: as `Gemma3.hidden_states` takes them.
    """
    is_packed = cached is None and has_varlen_kernel(x, config.head_dim)
    if is_packed:
        document_starts = _row_starts(x) if document_starts is None else document_starts
        # Compiled layers take any number of documents.
        torch._dynamo.maybe_mark_dynamic(document_starts, 0)
    full, sliding = (
        _make_context(config, x, is_sliding, document_starts, is_packed, cached)
        for is_sliding in (False, True)
    )
    return full, sliding


def _make_context(
    config: Gemma3Config,
    x: Tensor,
    is_sliding: bool,
    document_starts: Tensor | None,
    is_packed: bool,
    cached: CachePass | None,
) -> Context:
    window = config.sliding_window if is_sliding else None
    theta = config.rope_local_base_freq if is_sliding else config.rope_theta
    if cached is not None:
        positions, keys = cached.positions, cached.key_positions(is_sliding)  # B T, B S
    else:
        positions = keys = torch.arange(x.shape[1], device=x.device)[None]
    rotary = rotary_angles(positions, config.head_dim, theta)
    if is_packed:
        return Context(rotary, window, document_starts=document_starts)
    is_plain = cached is None and (window is None or x.shape[1] <= window)
    if is_plain and document_starts is None:
        return Context(rotary, window)
    mask = causal_mask(positions, keys, window)  # B T S
    if document_starts is not None:
        mask = mask & same_document(document_starts, *x.shape[:2])
    mask = mask[:, None]
    if cached is not None and x.device.type != "cpu":
        # What GPU kernels make of such a mask: once, not in every layer.
        mask = torch.where(mask, 0.0, -torch.inf).to(x.dtype)
    return Context(rotary, window, mask, cached=cached)


def _row_starts(x: Tensor) -> Tensor:
    """Returns the `document_starts` of a batch in which each row is a sequence."""
    size, num_tokens = x.shape[:2]
    end = size * num_tokens + 1
    return torch.arange(0, end, num_tokens, dtype=torch.int32, device=x.device)
