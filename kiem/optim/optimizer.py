"""The optimizer and its schedule."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any, Literal

import torch
from torch import nn

from kiem.optim.muon import Muon

BETAS = (0.9, 0.95)
# Beside Muon, AdamW has the embedding and the norms. Most rows of an embedding have no gradient in
# most updates, so their second moments need a longer memory (docs/recipe.md).
BETAS_BESIDE_MUON = (0.9, 0.99)
_COSINE_FLOOR = 0.1
_WSD_DECAY_SHARE = 0.2


def make_optimizers(
    model: nn.Module,
    kind: Literal["adamw", "muon"],
    weight_decay: float,
    local_params: Container[str] | None = None,
    matrix_dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """Returns what updates the parameters; the loop sets the learning rate.

    adamw: AdamW (arXiv:1711.05101) for all, which decays the hidden matrices, but not embeddings
    and norms. muon: Muon (kiem/optim/muon.py) for the hidden matrices, AdamW for the rest. Muon's
    updates are scaled to the size of AdamW's (arXiv:2502.16982, section 2.2), so both take the same
    learning rate.

    Args:
        model: what is trained.
        kind: which optimizer.
        weight_decay: of the hidden matrices.
        local_params: names of the parameters that they update; None: all.
        matrix_dtype: precision of Muon's products.
    """
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if local_params is None or name in local_params:
            (hidden if is_hidden_matrix(name, parameter) else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    by_adamw = [{"params": hidden, "weight_decay": weight_decay}] if kind == "adamw" else []
    by_adamw.append({"params": others, "weight_decay": 0.0})
    by_adamw = [group for group in by_adamw if group["params"]]
    if kind == "muon" and hidden:
        optimizers.append(Muon(hidden, weight_decay=weight_decay, dtype=matrix_dtype))
    if by_adamw:
        optimizers.append(_adamw(by_adamw, BETAS if kind == "adamw" else BETAS_BESIDE_MUON))
    return optimizers


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Returns AdamW with moments, all zero, which torch would make in the first step only."""
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state.update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})
            state["step"] = torch.zeros((), device=parameter.device)
    return optimizer


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Returns whether a parameter is a matrix within a layer: it decays, and Muon can update it."""
    return parameter.ndim == 2 and "embed" not in name


def learning_rate_share(
    progress: float, warmup: float, schedule: Literal["linear", "cosine", "wsd"]
) -> float:
    """Returns the learning rate as a share of the highest.

    Args:
        progress: share of the training that will be done after this update, in (0, 1].
        warmup: share of the training in which the rate rises.
        schedule: how it falls after that: linearly to 0, along a cosine to a tenth, or not at all
            until the last fifth of the training, in which it falls linearly to 0
            (warm-up, stable, decay: arXiv:2404.06395, section 4).
    """
    if progress < warmup:
        return progress / warmup
    fallen = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if schedule == "wsd":
        return min(1.0, (1 - progress) / _WSD_DECAY_SHARE)
    if schedule == "cosine":
        return _COSINE_FLOOR + (1 - _COSINE_FLOOR) * (1 + math.cos(math.pi * fallen)) / 2
    return 1 - fallen
