"""Muon (https://kellerjordan.github.io/posts/muon): momentum, made orthogonal, updates matrices.

torch.optim.Muon does the same; this one is faster, since it takes many small matrices at a time and
goes over large ones less often. Its state has the same names and values, whichever wrote it.
Shapes: S matrices at a time, m rows and n columns, m <= n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kiem.memory import rows_in_cache

# Of the quintic whose five-fold application takes singular values to about 1 (same source).
_A, _B, _C = 3.4445, -4.7750, 2.0315
# How many steps are taken on X X^T before X itself is multiplied. The products of a large, wide X
# cost most, so two rounds do, of which each adds some noise of bf16. For small ones little is
# gained, and their noise would be larger.
_LARGE_ROUNDS, _ROUNDS = (3, 2), (1, 1, 1, 1, 1)
_LARGE_ROWS = 512
_WIDE = 2
# Into how many bands of rows a large X X^T is cut, of which only what reaches the diagonal or lies
# beyond it is multiplied: the rest is its mirror. Of gemma3-1b's, 1152 x 6912, two bands gain
# nothing on a CPU, three and four take about three quarters of the time.
_BANDS = 4
# Matrices taken together: small ones one by one would leave a CPU's threads waiting for each other.
_MOST_ELEMENTS = 1 << 23
_ELEMENTS_IN_CACHE = 1 << 18


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled decay, its updates scaled to the size of AdamW's.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: share of the weights, times the learning rate, that an update takes away.
        momentum: of the average of gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
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
        momentum = group["momentum"]
        rows, columns = sorted(parameters[0].shape)
        size = (len(parameters), rows, columns)
        updates = torch.empty(size, dtype=torch.bfloat16, device=parameters[0].device)  # S m n
        for parameter, update in zip(parameters, updates, strict=True):
            assert parameter.grad is not None
            average, update = self.state[parameter]["momentum_buffer"], _like(update, parameter)
            for few in rows_in_cache(parameter, _ELEMENTS_IN_CACHE):
                gradient = parameter.grad[few]
                average[few].lerp_(gradient, 1 - momentum)
                # In bf16 before it is transposed: that is half the memory to jump about in.
                update[few] = gradient.lerp(average[few], momentum).bfloat16()
        updates = orthogonalize(updates)
        # The root mean square of AdamW's updates is about 0.2 (arXiv:2502.16982, section 2.2).
        learning_rate = 0.2 * math.sqrt(columns) * group["lr"]
        for parameter, update in zip(parameters, updates, strict=True):
            update = _like(update, parameter)
            for few in rows_in_cache(parameter, _ELEMENTS_IN_CACHE):
                parameter[few].mul_(1 - group["lr"] * group["weight_decay"])
                parameter[few].add_(update[few], alpha=-learning_rate)


def orthogonalize(x: Tensor) -> Tensor:
    """Returns matrices with the singular vectors of x and singular values of about 1.

    Five Newton-Schulz steps, X <- (a + b X X^T + c (X X^T)^2) X. With P what X is multiplied by,
    the next X X^T is P (X X^T) P, so several steps can be taken before X is.

    Args:
        x: bf16 [S, m, n], m <= n.
    """
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for num_steps in _rounds(*x.shape[1:]):
        gram = _gram(x)  # S m m
        factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)  # S m m
        if num_steps == 1:  # a X is added in fp32
            x = torch.baddbmm(x, factor, x, beta=_A)
            continue
        factor.diagonal(dim1=1, dim2=2).add_(_A)
        product = factor  # S m m
        for _ in range(num_steps - 1):
            gram = _multiply(_multiply(factor, gram), factor)
            factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
            factor.diagonal(dim1=1, dim2=2).add_(_A)
            product = _multiply(factor, product)
        x = _multiply(product, x)
    return x


def orthogonalize_flops(rows: int, columns: int) -> float:
    """Returns the FLOP of `orthogonalize` for one matrix of a shape."""
    m, n = sorted((rows, columns))
    share_of_gram = (_BANDS + 1) / (2 * _BANDS) if _is_large(m, n) else 1.0
    return sum(
        (1 + share_of_gram) * 2 * m * m * n + (4 * num_steps - 3) * 2 * m**3
        for num_steps in _rounds(m, n)
    )


def _gram(x: Tensor) -> Tensor:
    """Returns X X^T, [S, m, m]."""
    rows = x.shape[1]
    if not _is_large(*x.shape[1:]):
        return _multiply(x, x.mT)
    gram = x.new_empty(len(x), rows, rows)
    size = -(-rows // _BANDS)
    for start in range(0, rows, size):
        end = start + size
        band = gram[:, start:end]
        band[:, :, start:] = _multiply(x[:, start:end], x[:, start:].mT)
        gram[:, end:, start:end] = band[:, :, end:].mT
    return gram


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Returns the products of matrices [S, ...]; of a single pair a CPU's bmm takes longer."""
    return (a[0] @ b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def _rounds(rows: int, columns: int) -> tuple[int, ...]:
    return _LARGE_ROUNDS if _is_large(rows, columns) else _ROUNDS


def _is_large(rows: int, columns: int) -> bool:
    """Says whether products of X cost so much that X X^T is worth some care."""
    return rows >= _LARGE_ROWS and columns >= _WIDE * rows


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yields matrices of one shape, up to transposition, that are taken together."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
    for (rows, columns), alike in by_shape.items():
        num_together = max(1, _MOST_ELEMENTS // (rows * columns))
        for start in range(0, len(alike), num_together):
            yield alike[start : start + num_together]


def _like(update: Tensor, parameter: Tensor) -> Tensor:
    """Returns a view of an update [m, n] that has the shape of its parameter."""
    return update.T if parameter.shape[0] > parameter.shape[1] else update
