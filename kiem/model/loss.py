"""Cross entropy over a large vocabulary, computed without ever holding all logits.

1024 tokens x 262 144 entries are 1.07 GB of logits in fp32, as much again for their gradient. Here
they exist for a block of rows at a time: the forward pass computes a block's logits, its part of
the loss, and at once its part of the gradients, so the backward pass has nothing left to do.
Products go over a slice of the vocabulary at a time, so that under autocast neither the weights nor
their gradients exist in low precision as a whole. Shapes:

    N tokens    R tokens in a block    V vocabulary entries    S of them in a slice    D hidden_size
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
# Entries of the vocabulary whose weights are cast at a time.
_VOCABULARY_SLICE = 8192
# Fewer rows make the matrix products slow (80 GFLOP/s at 64 rows, 290 at 512, on two CPU cores),
# and each block adds to the weight's gradient once more; more take memory.
_MAX_ROWS, _MIN_ROWS = 1024, 256
_MAX_BLOCK_BYTES = 1 << 30
_ELEMENTS_IN_CACHE = 1 << 20


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
    nats = torch.empty(len(hidden), device=hidden.device)
    with torch.no_grad():
        num_rows = _rows_per_block(len(weight), 4)
        for start in range(0, len(hidden), num_rows):
            block = slice(start, start + num_rows)
            logits = F.linear(hidden[block], weight)  # R V
            for rows in _rows_in_cache(logits):
                nats[block][rows] = F.cross_entropy(
                    logits[rows].float(),
                    targets[block][rows],
                    ignore_index=IGNORE,
                    reduction="none",
                )
    return nats


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    scale: Tensor | float = 1.0,
    weight_gradient: Tensor | None = None,
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

    Returns:
        (loss, nats): scalars of fp32 (fp64 for fp64 input); `nats` is the sum of -log p[target]
        and has no gradient.
    """
    # Within a Function gradients are off, and its context does not know whether they were.
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, nats = _SummedCrossEntropy.apply(
        hidden, weight, targets, z_loss, scale, weight_gradient, needs_gradient
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
        scale: Tensor | float,
        weight_gradient: Tensor | None,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        is_mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_mixed else hidden.dtype
        x, w = hidden.detach().to(dtype), weight.detach()
        totals = x.new_zeros(2, dtype=torch.promote_types(dtype, torch.float32))  # loss, nats
        dx = dw = None
        if needs_gradient:
            dx = torch.zeros_like(hidden)
            dw = torch.zeros_like(weight) if weight_gradient is None else weight_gradient
        slices = [slice(at, at + _VOCABULARY_SLICE) for at in range(0, len(w), _VOCABULARY_SLICE)]
        # One buffer for all blocks, not up to a gigabyte of fresh pages for each.
        num_rows = _rows_per_block(len(w), x.element_size())
        buffer = x.new_empty(min(len(x), num_rows), len(w))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x), num_rows):
                rows = slice(start, start + num_rows)
                logits = buffer[: len(x[rows])]  # R V
                for part in slices:
                    torch.mm(x[rows], w[part].to(dtype).T, out=logits[:, part])
                totals += _differentiate(logits, targets[rows], z_loss, scale, totals.dtype)
                if dx is None or dw is None:
                    continue
                for part in slices:
                    gradient = logits[:, part]  # R S
                    _add_product(dx[rows], gradient, w[part].to(dtype))
                    _add_product(dw[part], gradient.T, x[rows])
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
        return dx, dw, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total`, which may have a higher precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _differentiate(
    logits: Tensor,
    targets: Tensor,
    z_loss: float,
    scale: Tensor | float,
    sum_dtype: torch.dtype,
) -> Tensor:
    """Turns logits [R, V] into the gradient of the loss with respect to them, in place.

    Returns:
        The loss and the nats of these rows, [2], in `sum_dtype`.
    """
    totals = torch.zeros(2, dtype=sum_dtype, device=logits.device)
    for rows in _rows_in_cache(logits):
        counted = targets[rows] != IGNORE  # R
        index = targets[rows].clamp(min=0)[:, None]  # R 1
        values = logits[rows].to(sum_dtype)  # R V; not a copy if that is their precision
        target_logits = values.gather(1, index)[:, 0]  # R
        highest = values.amax(1, keepdim=True)  # R 1
        sums = values.sub_(highest).exp_().sum(1)  # R
        log_z = sums.log() + highest[:, 0]  # R
        nats = ((log_z - target_logits) * counted).sum()
        loss = scale * (nats + z_loss * (log_z.square() * counted).sum())
        totals += torch.stack([loss, nats])
        # d loss / d logits = scale (softmax (1 + 2 z log Z) - onehot), 0 where nothing counts.
        weight = scale * counted.to(sum_dtype)  # R
        values.mul_((weight * (1 + 2 * z_loss * log_z) / sums)[:, None])
        values.scatter_add_(1, index, -weight[:, None])
        logits[rows] = values
    return totals


def _rows_per_block(vocab_size: int, element_bytes: int) -> int:
    """Returns for how many tokens there are logits at a time, whose elements have so many bytes."""
    return min(_MAX_ROWS, max(_MIN_ROWS, _MAX_BLOCK_BYTES // (vocab_size * element_bytes)))


def _rows_in_cache(matrix: Tensor) -> Iterator[slice]:
    """Yields the rows that elementwise operations go over together.

    On a CPU these are so few that they stay in its cache meanwhile; elsewhere, and for fake tensors
    without data (planning/memory_estimate.py), all rows.
    """
    num_rows = max(1, len(matrix))
    if matrix.device.type == "cpu" and type(matrix) in (Tensor, nn.Parameter):
        num_rows = max(1, _ELEMENTS_IN_CACHE // matrix.shape[1])
    for start in range(0, len(matrix), num_rows):
        yield slice(start, start + num_rows)
