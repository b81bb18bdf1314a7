"""The embedding, which is also the output layer: one matrix with two uses and one gradient.

Shapes: B sequences in a batch, T tokens, V vocabulary entries, D hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """The matrix [V, D].

    Attributes:
        adds_to_gradient: whether a training pass adds this matrix's gradient to the one that is
            there, of earlier passes, and not by way of autograd, which would make a second tensor
            as large as the matrix; not where something waits for gradients to send them elsewhere.
    """

    adds_to_gradient = False

    def at_both_ends(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the rows of tokens and the matrix for the output layer, as training needs them.

        Args:
            ids: int64 [B, T].

        Returns:
            Rows [B, T, D], the weights [V, D], whose gradients become one in place, and [V, D] to
            which the output layer adds its gradient; None: it returns it.
        """
        gradient = self.weight.grad if self.adds_to_gradient else None
        rows, weight = _BothEnds.apply(self.weight, ids, gradient)
        return rows, weight, gradient

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits [..., V] of hidden states [..., D]."""
        return F.linear(hidden, self.weight).float()


class _BothEnds(torch.autograd.Function):
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
        ctx: Any, of_rows: Tensor, of_weight: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        (ids,) = ctx.saved_tensors
        # The loss made `of_weight` for this and keeps no other reference to it.
        whole = of_weight if ctx.gradient is None else ctx.gradient
        assert whole is not None
        whole.index_add_(0, ids.flatten(), of_rows.flatten(0, 1))
        return of_weight, None, None
