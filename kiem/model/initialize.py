"""Random weights, the same on every machine and for every number of processes."""

from __future__ import annotations

import torch
from torch import nn

from kiem.core.randomness import derive_seed

STANDARD_DEVIATION = 0.02


def initialize(model: nn.Module, seed: int) -> None:
    """Fills matrices with N(0, 0.02) and norm weights with 0 (a gain of 1), in place.

    Every parameter has a generator of its own, so its values depend on the seed and its name only.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                generator = torch.Generator().manual_seed(derive_seed(seed, f"init {name}"))
                values = torch.empty(parameter.shape).normal_(
                    0.0, STANDARD_DEVIATION, generator=generator
                )
                parameter.copy_(values)
