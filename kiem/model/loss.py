"""Cross entropy over a large vocabulary, computed without ever holding all logits.

1024 tokens x 262 144 entries are 1.07 GB of logits in fp32, as much again for their gradient. Here
they exist for a block of rows at a time: the forward pass computes a block's logits, its part of
the loss, and at once its part of the gradients, so the backward pass has nothing left to do. How
blocks are computed depends on the device (compute/cross_entropy.py). Shapes:

    N tokens    V vocabulary entries    D hidden_size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kiem.compute import cross_entropy
from kiem.compute.cross_entropy import LogitsGradient, Sums, logits_gradient
from kiem.compute.device import device_type

IGNORE = cross_entropy.IGNORE


def next_token_targets(input_ids: Tensor, bos_id: int, pad_id: int) -> Tensor:
    """Returns what each position should predict, int64 [B, T]: the next token, or IGNORE.

    Not predicted are padding and <bos>, which is always given, never written by the model; and the
    token after a chunk's last one is not known.
    """
    targets = torch.full_like(input_ids, IGNORE)
    following = input_ids[:, 1:]
    known = (following != bos_id) & (following != pad_id)
    targets[:, :-1] = torch.where(known, following, IGNORE)
    return targets


def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns -log p[target] of each token, fp32 [N], 0 for IGNORE, without gradient.

    Args:
        hidden: [N, D]; under autocast the products run in its precision.
        weight: [V, D].
        targets: int64 [N].
    """
    with torch.no_grad():
        if device_type(hidden) == "cpu":
            return cross_entropy.nats_on_cpu(hidden, weight, targets)
        x = hidden.to(_product_dtype(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            return cross_entropy.nats_on_gpu(x, weight, targets)


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    scale: Tensor | float = 1.0,
    weight_gradient: Tensor | None = None,
    logits_gradient: LogitsGradient = logits_gradient,
) -> tuple[Tensor, Tensor]:
    """Returns the summed loss of predicting `targets` with logits hidden @ weight.T.

    loss = scale * sum over tokens of (-log p[target] + z_loss * log(Z)^2), Z = sum(exp(logits));
    the second term (arXiv:2204.02311, section 5) keeps the logits from drifting.

    Args:
        hidden: [N, D]; under autocast the products run in its precision, the sums in fp32.
        weight: [V, D].
        targets: int64 [N]; positions with IGNORE do not count.
        z_loss: weight of the second term.
        scale: factor of the loss, which its gradients are computed with.
        weight_gradient: [V, D]; if given, the gradient of `weight` is added to it in the forward
            pass and autograd gets none, which saves a tensor of that size. The loss must then be
            the end of the graph.
        logits_gradient: that function, or what torch.compile made of it; used on a GPU.

    Returns:
        (loss, nats): scalars of fp32 (fp64 for fp64 input); `nats` is the sum of -log p[target]
        and has no gradient.
    """
    # Within a Function gradients are off, and its context does not know whether they were.
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not isinstance(scale, Tensor):  # torch.compile would make kernels for each number
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scale = torch.full((), scale, dtype=dtype, device=hidden.device)
    loss, nats = _SummedCrossEntropy.apply(
        hidden, weight, targets, z_loss, scale, weight_gradient, logits_gradient, needs_gradient
    )
    return loss, nats


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        scale: Tensor,
        weight_gradient: Tensor | None,
        logits_gradient: LogitsGradient,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        x, w = hidden.detach().to(_product_dtype(hidden)), weight.detach()
        totals = x.new_zeros(2, dtype=torch.promote_types(x.dtype, torch.float32))
        dx = dw = None
        if needs_gradient:
            dx = torch.zeros_like(hidden)
            dw = torch.zeros_like(weight) if weight_gradient is None else weight_gradient
        sums = Sums(totals, dx, dw)
        with torch.autocast(hidden.device.type, enabled=False):
            if device_type(hidden) == "cpu":
                cross_entropy.add_on_cpu(x, w, targets, z_loss, scale, sums)
            else:
                cross_entropy.add_on_gpu(x, w, targets, z_loss, scale, sums, logits_gradient)
        ctx.save_for_backward(dx, dw if weight_gradient is None else None)
        # Not views of one tensor: FSDP puts hooks on the loss.
        loss, nats = totals[0].clone(), totals[1].clone()
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        # In place: they have no other use, and dw is as large as the embedding.
        dx.mul_(gradient)
        if dw is not None:
            dw.mul_(gradient)
        return dx, dw, None, None, None, None, None, None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the precision of the factors of products: autocast's, or that of `hidden`."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
