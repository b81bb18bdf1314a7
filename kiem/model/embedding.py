"""Tied embedding: one matrix for the input and the output layer, with one gradient.

Shapes: B sequences in a batch, T tokens, V vocabulary entries, D hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedEmbedding(nn.Embedding):
    """The matrix [V, D].

    Attributes:
        adds_to_gradient: whether the output layer adds its gradient to `weight.grad` by itself.
            Autograd would make a second tensor as large as the matrix; it has to where the gradient
            that is kept is that of a shard.
    """

    adds_to_gradient = False

    def reset_parameters(self) -> None:
        """Draws weights as torch does, but none on the meta device, for which it takes seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def tie(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns what training needs of the input and the output layer.

        Args:
            ids: int64 [B, T].

        Returns:
            The rows of the tokens [B, T, D]; the weights [V, D] for the output layer; and the
            gradient [V, D] to which that adds its own, or None if it returns it to autograd.
        """
        gradient = self.weight.grad if self.adds_to_gradient else None
        rows, weight = _Tie.apply(self.weight, ids, gradient)
        return rows, weight, gradient

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits [..., V] of hidden states [..., D]."""
        return F.linear(hidden, self.weight).float()


class _Tie(torch.autograd.Function):
    """Adds the few rows of the input's gradient to the dense one of the output, in place."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(
        ctx: Any, rows_gradient: Tensor, weight_gradient: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        (ids,) = ctx.saved_tensors
        # The loss made `weight_gradient` for this and keeps no other reference to it.
        total = weight_gradient if ctx.gradient is None else ctx.gradient
        assert total is not None
        total.index_add_(0, ids.flatten(), rows_gradient.flatten(0, 1))
        return weight_gradient, None, None
