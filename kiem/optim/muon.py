"""The optimizer Muon (https://kellerjordan.github.io/posts/muon): orthogonalized momentum.

With NorMuon's division by rows (arXiv:2510.05491). It multiplies in the precision that is fast on
the device, and matrices of one shape together.
Shapes: S matrices at a time, m rows and n columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kiem.compute.device import device_type
from kiem.parallel.parallel_model import (
    is_sharded,
    local_part,
    num_shards,
    on_whole_matrices,
    sum_over_shards,
)

# Coefficients of the quintic that takes singular values to about 1 in five steps (same source).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_STEPS = 5
_SMALLEST = 1e-20  # in place of zero in a divisor
# The most values in a batch of matrices. On a CPU more do not stay in its cache. A GPU is busy with
# several matrices only; there a batch takes 0.8 GB, when the activations are gone.
_MAX_BATCH_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled decay, its updates scaled to the size of AdamW's.

    Args:
        params: matrices, all whole or all sharded by their rows: then each process orthogonalizes
            some of them.
        lr: learning rate.
        weight_decay: share of the weights, times the learning rate, that an update takes away.
        momentum: of the average of gradients.
        row_beta2: of the average of each row's squared size. Orthogonalized rows differ in size
            where a matrix has more rows than columns; divided by that average, all neurons learn at
            about one rate. 0: without that.
        dtype: precision of the products. bf16 is exact enough, but many CPUs are slow at it.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        row_beta2: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._row_beta2, self._dtype = row_beta2, dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["momentum_buffer"] = torch.zeros_like(parameter)
                if row_beta2:
                    state["row_squares"] = torch.zeros_like(parameter[:, 0])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters by their gradients; those without one stay as they are."""
        assert closure is None
        for group in self.param_groups:
            for parameters in _batches(p for p in group["params"] if p.grad is not None):
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Updates matrices of one shape; nothing here waits for a GPU."""
        num_rows, num_columns = parameters[0].shape
        weights = [local_part(p) for p in parameters]
        gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
        averages = [local_part(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"])
        x = torch.stack([update.to(self._dtype) for update in updates])  # S m n, or fewer rows
        if is_sharded(parameters[0]):
            x = on_whole_matrices(orthogonalize, x, num_rows)
        else:
            x = orthogonalize(x)
        x = x.float()  # once, and not in each operation below
        if self._row_beta2:
            self._divide_rows(x, parameters)
        # The root mean square of AdamW's updates is about 0.2 (arXiv:2502.16982, section 2.2).
        scale = 0.2 * math.sqrt(max(num_rows, num_columns))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, x.unbind(), alpha=-scale * group["lr"])

    def _divide_rows(self, x: Tensor, parameters: list[Tensor]) -> None:
        """Divides the rows of updates, in place, by their usual size; the whole keeps its size.

        Args:
            x: the updates [S, m, n], or this process's rows of them.
            parameters: what they are for.
        """
        squares = torch.linalg.vector_norm(x, dim=2).square()  # S m
        averages = [local_part(self.state[p]["row_squares"]) for p in parameters]
        torch._foreach_lerp_(averages, squares.unbind(), 1 - self._row_beta2)
        divisors = torch.stack(averages).clamp_(min=_SMALLEST)  # S m, squared
        sizes = torch.stack([squares.sum(1), (squares / divisors).sum(1)])  # 2 S, squared
        before, after = sum_over_shards(sizes, parameters[0])
        factors = (before / after.clamp(min=_SMALLEST))[:, None] / divisors
        x.mul_(factors.sqrt_()[:, :, None])


def orthogonalize(x: Tensor) -> Tensor:
    """Returns matrices with the singular vectors of x [S, m, n] and singular values of about 1.

    Five Newton-Schulz steps, X <- P X with P = a I + b X X^T + c (X X^T)^2, for m <= n. For m > n
    they are X <- X P with X^T X, since transposing costs as much as the products.
    """
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    is_tall, (short, long) = x.shape[1] > x.shape[2], sorted(x.shape[1:])
    if x.dtype == torch.float32 and long >= 2 * short:
        return _orthogonalize_oblong(x)
    for _ in range(_NUM_STEPS):
        factor = _polynomial(_gram(x))
        pair = (x, factor) if is_tall else (factor, x)
        x = torch.baddbmm(x, *pair, beta=_A)
    return x


def _gram(x: Tensor) -> Tensor:
    """Returns the smaller of X X^T and X^T X, symmetric and k x k for k = min(m, n) [S, k, k]."""
    return x.mT @ x if x.shape[1] > x.shape[2] else x @ x.mT


def _orthogonalize_oblong(x: Tensor) -> Tensor:
    """Takes the steps on the small product of X with itself, and multiplies X once, by all P.

    P commutes with X X^T, so the next X X^T is P P X X^T. It squares the singular values, for which
    bf16 has too few digits.
    """
    gram = _gram(x)
    product = factor = _step_factor(gram)  # S k k
    for _ in range(_NUM_STEPS - 1):
        gram = factor @ (factor @ gram)
        factor = _step_factor(gram)
        product = factor @ product
    return x @ product if x.shape[1] > x.shape[2] else product @ x


def _step_factor(gram: Tensor) -> Tensor:
    """Returns P of a step, from X X^T [S, k, k]."""
    factor = _polynomial(gram)
    factor.diagonal(dim1=1, dim2=2).add_(_A)
    return factor


def _polynomial(gram: Tensor) -> Tensor:
    """Returns b G + c G^2 of matrices G [S, m, m]."""
    return torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields matrices of one shape that are updated together."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for alike in by_shape.values():
        # Of sharded matrices each process has a share.
        limit = _MAX_BATCH_ELEMENTS[device_type(alike[0])]
        batch_size = max(1, limit // alike[0].numel()) * num_shards(alike[0])
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]
