"""How inference keeps weights on the CPU: as stored, or quantized to 8 or 4 bits in groups.

Both are symmetric: a weight is a whole number times its group's scale, which is bf16. int8 has a
scale for every 128 weights of a row, the largest magnitude / 127; int4 one for every 32, the one of
some candidates with the least squared error (numbers -8 to 7). The embedding, which is also the
output layer, is quantized like the matrices; norms stay as they are. Shapes:

    N output features (rows)    K input features    G groups of a row
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.inference.kernels import Form, linear, load_kernels, unpack
from kiem.model.gemma3 import Gemma3

# With more tokens of a sequence, arithmetic is the limit and not memory, and torch's products (AMX,
# where there is) are better at it. The number of sequences does not count: with the kernel none of
# them depends on how many others there are.
MOST_TOKENS = 16
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_COLUMNS_STEP = 128
_INT8_GROUP = 128
_INT4_GROUP = 32
# Candidates for the scale of a group: as if its largest magnitude were this number.
_INT4_STEPS = (-8.0, -7.5, -7.0, -6.5, 6.5, 7.0, 7.5)


class Weights(nn.Module):
    """A matrix [N, K] in one of the forms, and products with it.

    Attributes:
        stored: fp32 or bf16 [N, K], int8 [N, K], or uint8 [N, K / 2] with two int4 in a byte.
        scales: bf16 [N, G] of int8 and int4; None of the others.
    """

    stored: Tensor
    scales: Tensor | None

    def __init__(self, weight: Tensor, form: Form, dtype: torch.dtype):
        super().__init__()
        scales = None
        self.num_columns = weight.shape[1]
        self.form = form
        self.dtype = dtype
        if form == "int8":
            weight, scales = quantize_int8(weight)
        elif form == "int4":
            weight, scales = quantize_int4(weight)
        self.fits_kernel = self.num_columns % _COLUMNS_STEP == 0 and dtype in KERNEL_DTYPES
        self.register_buffer("stored", weight)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x @ weights.T, [B, T, N] or [B, N], of x [B, T, K] or [B, K]."""
        return self.multiply(x, self.dtype)

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The same in another precision."""
        is_few = x.ndim == 2 or x.shape[1] <= MOST_TOKENS
        if is_few and self.fits_kernel and not isinstance(load_kernels(), str):
            return linear(x, self.stored, self.scales, self.form, dtype)
        return F.linear(x, self.whole(self.stored, self.scales)).to(dtype)

    def whole(self, stored: Tensor, scales: Tensor | None) -> Tensor:
        """Returns rows of the matrix in the precision of the activations."""
        if scales is None:
            return stored
        if not isinstance(load_kernels(), str):
            return unpack(stored, scales, self.num_columns, self.form, self.dtype)
        numbers = stored if self.form == "int8" else unpack_int4(stored)
        groups = numbers.unflatten(1, (scales.shape[1], -1)).float()
        return (groups * scales.float()[..., None]).flatten(1).to(self.dtype)


class EmbeddingWeights(Weights):
    """The embedding, which is also the output layer."""

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows of token ids [...], [..., K]."""
        flat = ids.flatten()
        scales = None if self.scales is None else self.scales[flat]
        return self.whole(self.stored[flat], scales).unflatten(0, ids.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits [B, N] of hidden states [B, K]."""
        return self.multiply(hidden, torch.float32)


def can_quantize(model: Gemma3) -> bool:
    """Says whether the rows of all matrices have whole groups and fit the kernel's steps."""
    return all(p.shape[1] % _COLUMNS_STEP == 0 for p in model.parameters() if p.ndim == 2)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 [N, K] and bf16 scales [N, G] of a matrix [N, K]."""
    stored = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), weight.shape[1] // _INT8_GROUP, dtype=torch.bfloat16)
    for rows in _row_blocks(weight):
        groups = weight[rows].float().unflatten(1, (-1, _INT8_GROUP))  # n G 128
        # Up, so that no rounded scale makes the largest number 128.
        scale = (groups.abs().amax(-1) / 127 * (1 + 2**-8)).to(torch.bfloat16)
        inverse = _inverse(scale.float())[..., None]
        stored[rows] = (groups * inverse).round_().clamp_(-127, 127).flatten(1).to(torch.int8)
        scales[rows] = scale
    return stored, scales


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns uint8 [N, K / 2], packed for the kernel, and bf16 scales [N, G] of [N, K]."""
    num_rows, num_columns = weight.shape
    stored = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8)
    scales = torch.empty(num_rows, num_columns // _INT4_GROUP, dtype=torch.bfloat16)
    for rows in _row_blocks(weight):
        groups = weight[rows].float().unflatten(1, (-1, _INT4_GROUP))  # n G 32
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # n G 1
        least = torch.full(groups.shape[:-1], torch.inf)
        best_scale = torch.zeros(groups.shape[:-1])
        best_numbers = torch.zeros_like(groups)
        for step in _INT4_STEPS:
            scale = (extreme / step).to(torch.bfloat16).float()
            numbers = (groups * _inverse(scale)).round_().clamp_(-8, 7)
            error = (numbers * scale).sub_(groups).square_().sum(-1)
            is_better = error < least
            least = torch.where(is_better, error, least)
            best_scale = torch.where(is_better, scale[..., 0], best_scale)
            best_numbers = torch.where(is_better[..., None], numbers, best_numbers)
        stored[rows] = _pack_int4(best_numbers.flatten(1))
        scales[rows] = best_scale.to(torch.bfloat16)
    return stored, scales


def unpack_int4(stored: Tensor) -> Tensor:
    """Returns the numbers -8 to 7, int8 [N, K], of what `quantize_int4` packed."""
    low, high = stored & 15, stored >> 4
    # n blocks (16 lanes, 4 bytes) of 2 nibbles
    nibbles = torch.stack([low, high], -1).unflatten(1, (-1, 16, 4))
    return nibbles.flatten(-2).transpose(-1, -2).flatten(1).to(torch.int8) - 8


def _pack_int4(numbers: Tensor) -> Tensor:
    """Returns numbers -8 to 7 [n, K] as uint8 [n, K / 2].

    Of 128 numbers, number 16 i + lane is nibble i of the 32-bit word `lane`.
    """
    nibbles = (numbers + 8).to(torch.uint8).unflatten(1, (-1, 8, 16)).transpose(-1, -2)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).flatten(1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _row_blocks(weight: Tensor) -> list[slice]:
    """Returns parts of a matrix's rows that are small beside the memory."""
    step = max(1, (1 << 18) // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]
