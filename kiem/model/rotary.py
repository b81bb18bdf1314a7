"""Rotary position embeddings (arXiv:2104.09864). Shapes:

B sequences in a batch    T tokens    C head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor

# Cosines and sines of the angles, each [B or 1, T, 1, C / 2].
Rotary = tuple[Tensor, Tensor]


def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Returns the angles of position 1, fp32 [C / 2]."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    return theta ** -(exponents / head_dim)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Returns cosines and sines of the angles at positions [B or 1, T], in fp32."""
    frequencies = rotary_frequencies(head_dim, theta, positions.device)  # C/2
    angles = positions.float()[:, :, None, None] * frequencies  # B T 1 C/2
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns queries or keys [B, T, heads, C] by the angles of their positions."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
