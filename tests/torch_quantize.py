"""Quantization in torch: what the kernels are compared with, to the bit.

Shapes: N output features (rows), K input features, G groups of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kiem.compute.kernels import Format, Weight

_BLOCK_ROWS = 16
_INT8_GROUP = 128
_INT4_GROUP = 64
_OFFSETS: dict[Format, int] = {"int8": 128, "int4": 8}
# Candidates for the scale of a group: as if its largest magnitude were this number.
_INT4_STEPS = (-8.0, -7.5, -7.0, -6.5, 6.5, 7.0, 7.5)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns numbers int8 [N, K] and bf16 scales [N, G] of a matrix [N, K]."""
    groups = weight.float().unflatten(1, (-1, _INT8_GROUP))  # N G 128
    # Up, so that no rounded scale makes the largest number 128.
    scale = (groups.abs().amax(-1) / 127 * (1 + 2**-8)).to(torch.bfloat16)
    numbers = (groups * _inverse(scale.float())[..., None]).round().clamp(-127, 127)
    return numbers.flatten(1).to(torch.int8), scale


def round_to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns numbers int8 [N, K], -8 to 7, and bf16 scales [N, G] of a matrix [N, K]."""
    groups = weight.float().unflatten(1, (-1, _INT4_GROUP))  # N G 64
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # N G 1
    least = torch.full(groups.shape[:-1], torch.inf)  # N G
    best_scale = torch.zeros_like(least)
    best_numbers = torch.zeros_like(groups)
    for step in _INT4_STEPS:
        scale = (extreme / step).to(torch.bfloat16).float()
        numbers = (groups * _inverse(scale)).round().clamp(-8, 7)
        error = (numbers * scale - groups).square()
        while error.shape[-1] > 1:  # halves, so that the order of the sum is not torch's choice
            first, second = error.chunk(2, -1)
            error = first + second
        is_better = error[..., 0] < least
        least = torch.where(is_better, error[..., 0], least)
        best_scale = torch.where(is_better, scale[..., 0], best_scale)
        best_numbers = torch.where(is_better[..., None], numbers, best_numbers)
    return best_numbers.flatten(1).to(torch.int8), best_scale.to(torch.bfloat16)


def pack(numbers: Tensor, scales: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Returns numbers int8 [N, K] and scales [N, G] as the kernels read them."""
    missing = -len(numbers) % _BLOCK_ROWS
    unsigned = F.pad(numbers.short() + _OFFSETS[format], (0, 0, 0, missing), value=_OFFSETS[format])
    blocks = unsigned.to(torch.uint8).unflatten(0, (-1, _BLOCK_ROWS))  # n 16 K
    if format == "int8":
        stored = blocks.unflatten(-1, (-1, 4)).transpose(1, 2)
    else:
        words = blocks.unflatten(-1, (-1, 2, 4)).transpose(1, 2)  # n K/8 16 2 4
        stored = words[..., 0, :] | words[..., 1, :] << 4
    scales = F.pad(scales, (0, 0, 0, missing)).unflatten(0, (-1, _BLOCK_ROWS)).transpose(1, 2)
    return stored.contiguous(), scales.contiguous()


def dequantize(weight: Weight) -> Tensor:
    """Returns a packed matrix as fp32 [N, K]."""
    stored, scales = weight.data, weight.scales
    assert scales is not None
    if weight.format == "int4":
        stored = torch.stack([stored & 15, stored >> 4], -2).flatten(3)  # n K/8 16 8
    numbers = stored.transpose(1, 2).flatten(2).float() - _OFFSETS[weight.format]  # n 16 K
    groups = numbers.unflatten(-1, (scales.shape[1], -1))
    whole = groups * scales.float().transpose(1, 2)[..., None]
    return whole.flatten(2).flatten(0, 1)[: weight.num_rows]


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 0, 1 / scale)
