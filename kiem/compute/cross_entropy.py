"""Cross entropy of many tokens and its gradients, block by block, as each device computes it best.

Shapes:

    N tokens    R tokens in a block    V vocabulary entries    S of them in a slice    D hidden_size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The target of a position that does not count.
IGNORE = -100

# On a CPU: entries of the vocabulary whose weights are cast at a time,
_VOCABULARY_SLICE = 8192
# columns of logits that a product in fp32 writes at a time (MKL on AVX2 is 10 to 20 % faster at it
# than with a whole slice),
_FP32_COLUMNS = 512
# and rows of a block. Fewer make the matrix products slow (80 GFLOP/s at 64 rows, 290 at 512, on
# two cores), and each block adds to the weight's gradient once more; more take memory.
_MAX_ROWS, _MIN_ROWS = 1024, 256
_MAX_BLOCK_BYTES = 1 << 30
_ELEMENTS_IN_CACHE = 1 << 20
# On a GPU a block's logits and their gradient take so much: 2048 rows of Gemma's vocabulary. Each
# block reads and writes the weight's gradient, in 13 % of the time that its products take on an
# H100 (calculated).
GPU_BLOCK_BYTES = 3 << 30


class Sums(NamedTuple):
    """What blocks add to.

    Attributes:
        totals: the loss, and the nats that are part of it, [2].
        hidden: gradient of the hidden states [N, D], zeros before; None if no gradient is wanted.
        weight: gradient of the weights [V, D]; None as well.
    """

    totals: Tensor
    hidden: Tensor | None
    weight: Tensor | None


# Computes `logits_gradient`.
LogitsGradient = Callable[[Tensor, Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]]


def add_on_gpu(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    scale: Tensor,
    sums: Sums,
    logits_gradient: LogitsGradient,
) -> None:
    """Adds loss and gradients of all tokens to `sums`; nothing in it waits for the GPU.

    Args:
        x: [N, D]; the products' factors have its precision.
        weight: [V, D].
        targets: int64 [N].
        z_loss, scale: as in `differentiate`.
        logits_gradient: the function of that name, or what torch.compile made of it.
    """
    # One copy for all blocks; it takes so little time that none is kept between passes.
    w = weight.to(x.dtype)
    # Blocks of one size, since torch.compile makes kernels for each.
    num_blocks = -(-len(x) // _rows_on_gpu(len(w), sums.totals.element_size() + x.element_size()))
    num_rows = -(-len(x) // num_blocks)
    for start in range(0, len(x), num_rows):
        block = x[start : start + num_rows]
        rows = slice(start, start + len(block))
        missing = num_rows - len(block)
        gradient, totals = logits_gradient(
            F.pad(block, (0, 0, 0, missing)),
            w,
            F.pad(targets[rows], (0, missing), value=IGNORE),
            z_loss,
            scale,
        )
        sums.totals.add_(totals)
        if sums.hidden is None or sums.weight is None:
            continue
        gradient = gradient[: len(block)]
        dx, dw = sums.hidden[rows], sums.weight
        torch.mm(gradient, w, out_dtype=dx.dtype, out=dx)
        torch.addmm(dw, gradient.T, block, out_dtype=dw.dtype, out=dw)
        del gradient  # before the next block has one


def logits_gradient(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the logits x @ weight.T [R, V], and loss and nats [2], on a GPU.

    The product is part of it, so that compiled kernels need not write back what `differentiate`
    leaves of the logits.
    """
    logits = torch.mm(x, weight.T, out_dtype=torch.promote_types(x.dtype, torch.float32))
    gradient = torch.empty_like(logits, dtype=x.dtype)
    return gradient, differentiate(logits, targets, z_loss, scale, gradient)


def nats_on_gpu(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns -log p[target] of each token, fp32 [N], 0 for IGNORE; arguments of `add_on_gpu`."""
    nats = torch.empty(len(x), device=x.device)
    w = weight.to(x.dtype)
    num_rows = _rows_on_gpu(len(w), 4 + 4)  # logits and their log_softmax
    for start in range(0, len(x), num_rows):
        rows = slice(start, start + num_rows)
        logits = torch.mm(x[rows], w.T, out_dtype=torch.float32)  # R V
        nats[rows] = F.cross_entropy(logits, targets[rows], ignore_index=IGNORE, reduction="none")
    return nats


def _rows_on_gpu(vocab_size: int, entry_bytes: int) -> int:
    return max(1, GPU_BLOCK_BYTES // (vocab_size * entry_bytes))


def add_on_cpu(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, scale: Tensor, sums: Sums
) -> None:
    """Adds loss and gradients of all tokens to `sums`; arguments as in `add_on_gpu`.

    Products go over a slice of the vocabulary at a time, so that neither the weights nor their
    gradients exist in low precision as a whole.
    """
    slices = _slices(len(weight), _VOCABULARY_SLICE)
    columns = _slices(len(weight), _FP32_COLUMNS) if x.dtype == torch.float32 else slices
    # One buffer for all blocks, not up to a gigabyte of fresh pages for each.
    num_rows = _rows_on_cpu(len(weight), x.element_size())
    buffer = x.new_empty(min(len(x), num_rows), len(weight))
    for start in range(0, len(x), num_rows):
        rows = slice(start, start + num_rows)
        logits = buffer[: len(x[rows])]  # R V
        for part in columns:
            torch.mm(x[rows], weight[part].to(x.dtype).T, out=logits[:, part])
        totals = torch.zeros_like(sums.totals)
        for cached in _rows_in_cache(logits):
            gradient = logits[cached]
            values = gradient.to(totals.dtype)  # not a copy if that is their precision
            totals += differentiate(values, targets[rows][cached], z_loss, scale, gradient)
        sums.totals.add_(totals)
        if sums.hidden is None or sums.weight is None:
            continue
        for part in slices:
            gradient = logits[:, part]  # R S
            _add_product(sums.hidden[rows], gradient, weight[part].to(x.dtype))
            _add_product(sums.weight[part], gradient.T, x[rows])


def nats_on_cpu(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns what `nats_on_gpu` does; arguments as in `add_on_gpu`."""
    nats = torch.empty(len(x))
    num_rows = _rows_on_cpu(len(weight), 4)
    for start in range(0, len(x), num_rows):
        rows = slice(start, start + num_rows)
        logits = F.linear(x[rows], weight)  # R V
        for cached in _rows_in_cache(logits):
            nats[rows][cached] = F.cross_entropy(
                logits[cached].float(),
                targets[rows][cached],
                ignore_index=IGNORE,
                reduction="none",
            )
    return nats


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _rows_on_cpu(vocab_size: int, entry_bytes: int) -> int:
    return min(_MAX_ROWS, max(_MIN_ROWS, _MAX_BLOCK_BYTES // (vocab_size * entry_bytes)))


def _rows_in_cache(matrix: Tensor) -> Iterator[slice]:
    """Yields so few rows that they stay in a CPU's cache while elementwise operations go over them.

    All rows of fake tensors, which have no data (planning/memory_estimate.py).
    """
    num_rows = max(1, len(matrix))
    if type(matrix) in (Tensor, nn.Parameter):
        num_rows = max(1, _ELEMENTS_IN_CACHE // matrix.shape[1])
    for start in range(0, len(matrix), num_rows):
        yield slice(start, start + num_rows)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total`, which may have a higher precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def differentiate(
    logits: Tensor, targets: Tensor, z_loss: float, scale: Tensor, gradient: Tensor
) -> Tensor:
    """Writes the gradient of the loss with respect to `logits`, which are lost.

    Args:
        logits: [R, V], fp32 or fp64.
        targets: int64 [R]; rows with IGNORE do not count.
        z_loss: weight of the squared log-normalizer in the loss.
        scale: factor of the loss, a scalar.
        gradient: [R, V], written; may be `logits`.

    Returns:
        The loss and the nats of these rows, [2], in the precision of `logits`.
    """
    counted = targets != IGNORE  # R
    index = targets.clamp(min=0)[:, None]  # R 1
    target_logits = logits.gather(1, index)  # R 1
    highest = logits.amax(1, keepdim=True)  # R 1
    # keepdim: torch.compile knows softmax by it, and finds both in one pass over the logits.
    values = logits.sub_(highest).exp_()  # R V
    sums = values.sum(1, keepdim=True)  # R 1
    log_z = (sums.log() + highest)[:, 0]  # R
    nats = ((log_z - target_logits[:, 0]) * counted).sum()
    loss = scale * (nats + z_loss * (log_z.square() * counted).sum())
    # d loss / d logits = scale (softmax (1 + 2 z log Z) - onehot), 0 where nothing counts. The
    # target's is written once more: adding to it would make compiled kernels keep all in fp32.
    weight = scale * counted.to(logits.dtype)  # R
    factor = (weight * (1 + 2 * z_loss * log_z))[:, None] / sums  # R 1
    at_target = (target_logits - highest).exp() * factor - weight[:, None]  # R 1
    gradient.copy_(values.mul_(factor))
    gradient.scatter_(1, index, at_target.to(gradient.dtype))
    return torch.stack([loss, nats])
