"""Speed and error of kiem's matrix products in fp32 beside torch's.

    python benchmarks/products.py

Shapes are those of training gemma3-1b and gemma3-nano: layers forward, back to their input and to
their weights, and a slice of the output layer. The two take turns; errors are root mean squares
against fp64, relative to the result's. On processors without matrix units both are torch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kiem.memory import keep_freed_memory
from kiem.model.product import multiply_into

# Rows, inner size and columns; whether the factors lie transposed.
_SHAPES = {
    "1b, up": (1024, 1152, 6912, False, True),
    "1b, up, input's gradient": (1024, 6912, 1152, False, False),
    "1b, up, weight's gradient": (6912, 1024, 1152, True, False),
    "1b, queries": (1024, 1152, 1024, False, True),
    "1b, keys": (1024, 1152, 256, False, True),
    "1b, slice of logits": (1024, 1152, 8192, False, True),
    "nano, up": (4096, 256, 1024, False, True),
    "nano, up, weight's gradient": (1024, 4096, 256, True, False),
}


@dataclass(frozen=True)
class Options:
    """Time matrix products in fp32."""

    rounds: int = 20
    """Products of each side and shape."""


def main(options: Options) -> None:
    """Measures and prints a table."""
    keep_freed_memory()
    sides: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "torch": lambda out, a, b: torch.mm(a, b, out=out),
        "kiem": multiply_into,
    }
    table = Table(title="fp32 products, GFLOP/s: median (best)")
    for column in ("product", "shape", *sides, "ratio", *(f"error, {side}" for side in sides)):
        table.add_column(column)
    generator = torch.Generator().manual_seed(0)
    for name, (m, k, n, a_transposed, b_transposed) in _SHAPES.items():
        a = _random(m, k, a_transposed, generator)
        b = _random(k, n, b_transposed, generator)
        out = torch.empty(m, n)
        exact = a.double() @ b.double()
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        errors = []
        for run in sides.values():
            run(out, a, b)
            errors.append(((out - exact).square().mean() / exact.square().mean()).sqrt().item())
        for _ in range(options.rounds):
            for side, run in sides.items():
                began = time.perf_counter()
                run(out, a, b)
                seconds[side].append(time.perf_counter() - began)
        speeds = {side: sorted(2e-9 * m * k * n / s for s in seconds[side]) for side in sides}
        middle = {side: of_side[len(of_side) // 2] for side, of_side in speeds.items()}
        table.add_row(
            name,
            f"{m} x {k} x {n}",
            *(f"{middle[side]:.0f} ({speeds[side][-1]:.0f})" for side in sides),
            f"{middle['kiem'] / middle['torch']:.2f}x",
            *(f"{error:.1e}" for error in errors),
        )
    Console().print(table)


def _random(rows: int, columns: int, transposed: bool, generator: torch.Generator) -> Tensor:
    shape = (columns, rows) if transposed else (rows, columns)
    values = torch.randn(shape, generator=generator)
    return values.T if transposed else values


if __name__ == "__main__":
    main(tyro.cli(Options))
