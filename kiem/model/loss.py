"""Cross entropy over a large vocabulary without ever holding all logits.

1024 tokens x 262 144 entries are 1.07 GB of logits in fp32, as much again for their gradient. Here
they exist for a block of rows at a time: the forward pass computes a block's logits, its share of
the loss, and at once its share of the gradients, so the backward pass has nothing left to do. The
products go over a slice of the vocabulary at a time, so that weights in the precision of the
products, and gradients that come in it, are never there as a whole either.
Shapes: N tokens, R tokens in a block, V vocabulary entries, S of them in a slice, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
# Fewer rows make the matrix products slow (80 GFLOP/s at 64 rows, 290 at 512, on two CPU cores),
# and each block adds to the weight's gradient once more; more take memory.
_MOST_ROWS, _LEAST_ROWS = 1024, 256
_MOST_BLOCK_BYTES = 1 << 30
_ELEMENTS_IN_CACHE = 2**20
_VOCABULARY_SLICE = 8192


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
        targets: int64 [N]; positions with IGNORE count nothing.
        z_loss: weight of the second term.
        scale: what multiplies the loss, and so its gradients, which are computed with it.
        weight_gradient: [V, D]; if given, that of `weight` is added to it at once and autograd
            gets none: saves a tensor of that size, and going over it twice. The loss must then be
            the end of the graph.

    Returns:
        (loss, nats): scalars of fp32 (fp64 for fp64 input); `nats` is the sum of -log p[target]
        and has no gradient.
    """
    # Within a Function gradients are off, and its context knows only who could have one.
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, nats = _SummedCrossEntropy.apply(
        hidden, weight, targets, z_loss, scale, weight_gradient, needs_gradient
    )
    return loss, nats


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
        num_rows = rows_per_block(len(weight), 4)
        for start in range(0, len(hidden), num_rows):
            rows = slice(start, start + num_rows)
            logits = F.linear(hidden[rows], weight)  # R V
            for few in _rows_in_cache(logits, _ELEMENTS_IN_CACHE):
                values = logits[few].float()
                nats[rows][few] = F.cross_entropy(
                    values, targets[rows][few], ignore_index=IGNORE, reduction="none"
                )
    return nats


def rows_per_block(vocab_size: int, element_bytes: int) -> int:
    """Returns for how many tokens there are logits at a time, whose elements have so many bytes."""
    return min(_MOST_ROWS, max(_LEAST_ROWS, _MOST_BLOCK_BYTES // (vocab_size * element_bytes)))


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
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        x = hidden.detach().to(dtype or hidden.dtype)
        w = weight.detach()
        sum_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        totals = torch.zeros(2, dtype=sum_dtype, device=x.device)  # loss, nats
        x_gradient = torch.empty_like(hidden) if needs_gradient else None
        w_gradient = weight_gradient
        if needs_gradient and weight_gradient is None:
            w_gradient = torch.empty_like(weight)
        slices = [slice(at, at + _VOCABULARY_SLICE) for at in range(0, len(w), _VOCABULARY_SLICE)]
        # One buffer for all blocks, not up to a gigabyte of fresh pages for each.
        num_rows = rows_per_block(len(w), x.element_size())
        buffer = torch.empty(min(len(x), num_rows), len(w), dtype=x.dtype, device=x.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(x), num_rows):
                rows = slice(start, start + num_rows)
                logits = buffer[: len(x[rows])]  # R V
                for part in slices:
                    torch.mm(x[rows], w[part].to(x.dtype).T, out=logits[:, part])
                totals += _differentiate(logits, targets[rows], z_loss, scale, sum_dtype)
                if x_gradient is not None and w_gradient is not None:
                    is_main = start == 0 and weight_gradient is None
                    _multiply_back(
                        logits, x[rows], w, slices, x_gradient[rows], w_gradient, is_main
                    )
        ctx.save_for_backward(x_gradient, w_gradient if weight_gradient is None else None)
        # Not views of one tensor: what shares a model out puts hooks on the loss.
        loss, nats = totals[0].clone(), totals[1].clone()
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_gradient, w_gradient = ctx.saved_tensors
        # In place: nobody else sees these, and the second is as large as the embedding.
        x_gradient.mul_(gradient)
        if w_gradient is not None:
            w_gradient.mul_(gradient)
        return x_gradient, w_gradient, None, None, None, None, None


def _multiply_back(
    gradient: Tensor,
    x: Tensor,
    w: Tensor,
    slices: Sequence[slice],
    x_gradient: Tensor,
    w_gradient: Tensor,
    is_main: bool,
) -> None:
    """Puts the gradient of a block's logits [R, V] into those of x [R, D] and of w [V, D].

    Args:
        gradient: of the logits.
        x, w: what the logits are products of.
        slices: of the vocabulary.
        x_gradient: is written.
        w_gradient: is added to, but written by the first block, if that finds nothing in it.
    """
    for part in slices:
        of_logits = gradient[:, part]  # R S
        _multiply_into(x_gradient, of_logits, w[part].to(x.dtype), add=part.start > 0)
        _multiply_into(w_gradient[part], of_logits.T, x, add=not is_main)


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """Writes a @ b to `out`, or adds it; `out` may have a higher precision than the factors."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=1 if add else 0)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


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
    for rows in _rows_in_cache(logits, _ELEMENTS_IN_CACHE):
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


def _rows_in_cache(matrix: Tensor, most_elements: int) -> Iterator[slice]:
    """Yields rows that a CPU goes over together: few, so that they stay in its cache meanwhile.

    On other devices, and for a fake tensor (planning/dry_run.py), which has no data to be kept
    there, these are all rows.

    Args:
        matrix: [rows, columns].
        most_elements: how many of them are gone over together.
    """
    num_rows = max(1, len(matrix))
    if matrix.device.type == "cpu" and type(matrix) in (Tensor, nn.Parameter):
        num_rows = max(1, most_elements // matrix.shape[1])
    for start in range(0, len(matrix), num_rows):
        yield slice(start, start + num_rows)
