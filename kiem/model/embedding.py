"""The embedding, which is also the output layer: one matrix with two uses and one gradient.

Shapes: B sequences in a batch, T tokens, V vocabulary entries, D hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """The matrix [V, D]."""

    def at_both_ends(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows of tokens and the matrix for the output layer, as training needs them.

        Args:
            ids: int64 [B, T].

        Returns:
            Rows [B, T, D], and the weights [V, D]. The gradients of both become one in place; by
            themselves, autograd would add a second tensor as large as the embedding to the first.
        """
        rows, weight = _BothEnds.apply(self.weight, ids)
        return rows, weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits [..., V] of hidden states [..., D]."""
        return F.linear(hidden, self.weight).float()


class _BothEnds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor, of_weight: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        # The loss made `of_weight` for this and keeps no other reference to it.
        return of_weight.index_add_(0, ids.flatten(), of_rows.flatten(0, 1)), None
