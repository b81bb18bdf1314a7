"""The optimizer and its schedule."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

BETAS = (0.9, 0.95)
_COSINE_FLOOR = 0.1


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Returns AdamW (arXiv:1711.05101) that decays the matrices, but not embeddings and norms."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (decayed if is_matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def learning_rate_share(
    progress: float, warmup: float, schedule: Literal["linear", "cosine"]
) -> float:
    """Returns the learning rate as a share of the highest.

    Args:
        progress: share of the training that will be done after this update, in (0, 1].
        warmup: share of the training in which the rate rises.
        schedule: how it falls after that: linearly to 0, or along a cosine to a tenth.
    """
    if progress < warmup:
        return progress / warmup
    fallen = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if schedule == "cosine":
        return _COSINE_FLOOR + (1 - _COSINE_FLOOR) * (1 + math.cos(math.pi * fallen)) / 2
    return 1 - fallen
