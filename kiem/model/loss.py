"""Cross entropy over a large vocabulary without ever holding all logits.

1024 tokens x 262 144 entries are 1.07 GB of logits in fp32, as much again for their gradient. Here
they exist for a block of rows at a time: the forward pass computes a block's logits, its share of
the loss, and at once its share of the gradients, so the backward pass has nothing left to do.
Shapes: N tokens, R tokens in a block, V vocabulary entries, D hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
# Fewer rows make the matrix products slow (80 GFLOP/s at 64 rows, 290 at 512, on two CPU cores).
ROWS_PER_BLOCK = 512


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of predicting `targets` with logits hidden @ weight.T.

    loss = sum over tokens of (-log p[target] + z_loss * log(Z)^2), where Z = sum(exp(logits)); the
    second term (arXiv:2204.02311, section 5) keeps the logits from drifting.

    Args:
        hidden: [N, D]; under autocast the products run in its precision, the sums in fp32.
        weight: [V, D].
        targets: int64 [N]; positions with IGNORE count nothing.
        z_loss: weight of the second term.

    Returns:
        (loss, nats): scalars of fp32 (fp64 for fp64 input); `nats` is the first term alone and
        has no gradient.
    """
    loss, nats = _SummedCrossEntropy.apply(hidden, weight, targets, z_loss)
    return loss, nats


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        x = hidden.detach().to(dtype or hidden.dtype)
        w = weight.detach().to(dtype or weight.dtype)
        total = torch.zeros((), dtype=_sum_dtype(x), device=x.device)
        nats = torch.zeros_like(total)
        x_gradient = torch.empty_like(hidden) if needs_gradient else None
        w_gradient = torch.zeros_like(weight) if needs_gradient else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x), ROWS_PER_BLOCK):
                rows = slice(start, start + ROWS_PER_BLOCK)
                block_loss, block_nats, p = _block(x[rows], w, targets[rows], z_loss)
                total += block_loss
                nats += block_nats
                if x_gradient is not None and w_gradient is not None:
                    p = p.to(x.dtype)
                    x_gradient[rows] = p @ w
                    if w_gradient.dtype == x.dtype:
                        w_gradient.addmm_(p.T, x[rows])
                    else:
                        w_gradient += p.T @ x[rows]
        ctx.save_for_backward(x_gradient, w_gradient)
        ctx.mark_non_differentiable(nats)
        return total, nats

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_gradient, w_gradient = ctx.saved_tensors
        # In place: nobody else sees these, and the second is as large as the embedding.
        return x_gradient.mul_(gradient), w_gradient.mul_(gradient), None, None


def _block(x: Tensor, w: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (loss, nats, gradient of the logits [R, V]) of one block of rows."""
    logits = (x @ w.T).to(_sum_dtype(x))  # R V
    counted = targets != IGNORE  # R
    index = torch.where(counted, targets, 0)[:, None]  # R 1
    target_logits = logits.gather(1, index)[:, 0]  # R
    highest = logits.amax(1)  # R
    exponentials = logits.sub_(highest[:, None]).exp_()  # R V, in the logits' memory
    normalizers = exponentials.sum(1)  # R
    log_z = normalizers.log() + highest  # R
    zero = torch.zeros_like(log_z)
    nats = torch.where(counted, log_z - target_logits, zero).sum()
    loss = nats + z_loss * torch.where(counted, log_z.square(), zero).sum()
    # d loss / d logits = p (1 + 2 z log Z) - onehot(target), and 0 in rows that do not count.
    factor = torch.where(counted, (1 + 2 * z_loss * log_z) / normalizers, zero)
    gradient = exponentials.mul_(factor[:, None])
    gradient.scatter_add_(1, index, -counted.to(gradient.dtype)[:, None])
    return loss, nats, gradient


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
