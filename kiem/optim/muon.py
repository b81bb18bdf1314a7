"""Muon (https://kellerjordan.github.io/posts/muon): orthogonalized momentum updates matrices.

The same update as torch.optim.Muon, with the same state. It differs in three ways that make it
faster: it multiplies in the precision that is fast on the device, takes matrices of one shape
together, and iterates on X X^T where X is wide.
Shapes: S matrices at a time, m rows and n columns, m <= n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# Of the quintic whose five-fold application takes singular values to about 1 (same source).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_MIN_ROWS_BF16 = 512
# The most values of matrices that are taken together.
_MAX_BATCH_ELEMENTS = 1 << 23


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled decay, its updates scaled to the size of AdamW's.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: share of the weights, times the learning rate, that an update takes away.
        momentum: of the average of gradients.
        dtype: precision of the products. bf16 is exact enough, but many CPUs are slow at it.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters by their gradients; those without one stay as they are."""
        assert closure is None
        for group in self.param_groups:
            for parameters in _batches(p for p in group["params"] if p.grad is not None):
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Updates matrices of one shape, up to transposition."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        averages = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"])
        x = torch.stack([_wide(update).to(self._dtype) for update in updates])  # S m n
        # The root mean square of AdamW's updates is about 0.2 (arXiv:2502.16982, section 2.2).
        scale = 0.2 * math.sqrt(x.shape[-1])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for parameter, update in zip(parameters, orthogonalize(x), strict=True):
            _wide(parameter).add_(update, alpha=-scale * group["lr"])


def orthogonalize(x: Tensor) -> Tensor:
    """Returns matrices with the singular vectors of x and singular values of about 1.

    Five Newton-Schulz steps, X <- P X with P = a I + b X X^T + c (X X^T)^2. As P commutes with
    X X^T, the next X X^T is P (X X^T) P: several steps can be taken on X X^T before X is
    multiplied, which is cheaper where X is wide.

    Args:
        x: [S, m, n], m <= n.
    """
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for num_steps in _steps_on_gram(x.shape[1], x.shape[2], x.dtype):
        # A factor a I + F is kept as a and F: a is large, so F + a I would cost bf16 digits of F.
        gram = x @ x.mT  # S m m
        scale, product = _A, _polynomial(gram)  # 1, S m m
        factor = product
        for _ in range(num_steps - 1):
            half = torch.baddbmm(gram, factor, gram, beta=_A)
            gram = torch.baddbmm(half, half, factor, beta=_A)
            factor = _polynomial(gram)
            product = torch.baddbmm(_A * product + scale * factor, factor, product)
            scale *= _A
        x = torch.baddbmm(x, product, x, beta=scale)
    return x


def _polynomial(gram: Tensor) -> Tensor:
    """Returns b G + c G^2 of matrices G [S, m, m]."""
    return torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)


def _steps_on_gram(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Returns how many of the five steps are taken on X X^T before each product with X.

    X X^T squares the singular values. bf16 has to take it anew after three steps, and gains too
    little from that where matrices are small.
    """
    if columns < 2 * rows or (dtype == torch.bfloat16 and rows < _MIN_ROWS_BF16):
        return (1, 1, 1, 1, 1)
    return (3, 2) if dtype == torch.bfloat16 else (5,)


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields matrices of one shape, up to transposition, that are taken together."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
    for (rows, columns), alike in by_shape.items():
        batch_size = max(1, _MAX_BATCH_ELEMENTS // (rows * columns))
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def _wide(matrix: Tensor) -> Tensor:
    """Returns a view with at least as many columns as rows."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
