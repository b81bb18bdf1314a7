"""How inference keeps weights on the CPU: as stored, or quantized to 8 or 4 bits in groups.

Both are symmetric: a weight is a whole number times its group's scale, which is bf16. int8 has a
scale for every 128 weights of a row, the largest magnitude / 127; int4 one for every 64, the one of
some candidates with the least squared error (numbers -8 to 7). The embedding, which is also the
output layer, is quantized like the matrices; norms stay as they are. Where there are no kernels,
torch does the same here, to the bit. Shapes:

    N output features (rows)    K input features    G groups of a row

Numbers are packed for the kernels in blocks of 16 rows, the last one filled up: int8 are [N / 16,
K / 4, 16, 4]; int4 [N / 16, K / 8, 16, 4], two in a byte, of eight the first four in the lower
halves. An offset makes them unsigned. Scales are [N / 16, G, 16].
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.compute.arena import Arena
from kiem.compute.kernels import (
    BLOCK_ROWS,
    Form,
    Matrix,
    Product,
    load_kernels,
    quantize,
    unpack,
)
from kiem.model.gemma3 import Gemma3

# With more tokens of a sequence, arithmetic is the limit and not memory, and torch's products (AMX,
# where there is) are better at it. The number of sequences does not count: with the kernel none of
# them depends on how many others there are.
MOST_TOKENS = 16
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_INT8_GROUP = 128
_INT4_GROUP = 64
# Widths are multiples of this: a group of int8; what the kernels take at once of fp32 and bf16.
_COLUMNS_STEP = {"int8": 128, "int4": 128, "fp32": 32, "bf16": 32}
_OFFSETS = {"int8": 128, "int4": 8}
# Candidates for the scale of a group: as if its largest magnitude were this number.
_INT4_STEPS = (-8.0, -7.5, -7.0, -6.5, 6.5, 7.0, 7.5)


class Weights(nn.Module):
    """A matrix [N, K] in one of the forms, and products with it.

    Attributes:
        stored: fp32 or bf16 [N, K], or uint8, packed.
        scales: bf16 of int8 and int4; None of the others.
    """

    stored: Tensor
    scales: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        form: Form,
        dtype: torch.dtype,
        arena: Arena | None = None,
        *,
        in_fp32: bool = False,
    ):
        super().__init__()
        self.num_rows, self.num_columns = weight.shape
        self.form = form
        self.dtype = dtype
        self.in_fp32 = in_fp32
        scales = None
        if form in ("int8", "int4"):
            weight, scales = quantize_matrix(weight, form, arena)
        self.register_buffer("stored", weight)
        self.register_buffer("scales", scales)
        self.product: Product | None = None
        fits = self.num_columns % _COLUMNS_STEP[form] == 0 and dtype in KERNEL_DTYPES
        if fits and not isinstance(load_kernels(), str):
            self.product = Product([self.matrix], dtype, in_fp32=in_fp32)

    @property
    def matrix(self) -> Matrix:
        """It as the kernels take it."""
        return Matrix(self.stored, self.scales, self.num_rows, self.num_columns, self.form)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x @ weights.T, [B, T, N] or [B, N], of x [B, T, K] or [B, K]."""
        if self.product is not None and (x.ndim == 2 or x.shape[1] <= MOST_TOKENS):
            return self.product(x)
        y = F.linear(x, self.rows(None))
        return y.float() if self.in_fp32 else y

    def rows(self, ids: Tensor | None) -> Tensor:
        """Returns rows int64 [n], or all, in the precision of the activations."""
        if self.scales is None:
            return self.stored if ids is None else self.stored[ids]
        if not isinstance(load_kernels(), str):
            return unpack(self.matrix, ids, self.dtype)
        whole = dequantize(self.matrix).to(self.dtype)
        return whole if ids is None else whole[ids]


class EmbeddingWeights(nn.Module):
    """The embedding, which is also the output layer."""

    def __init__(self, weight: Tensor, form: Form, dtype: torch.dtype, arena: Arena):
        super().__init__()
        self.weights = Weights(weight, form, dtype, arena, in_fp32=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows of token ids [...], [..., K]."""
        return self.weights.rows(ids.flatten()).unflatten(0, ids.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits [B, N] of hidden states [B, K]."""
        return self.weights(hidden)


def can_quantize(model: Gemma3) -> bool:
    """Says whether the rows of all matrices have whole groups."""
    return all(p.shape[1] % _INT8_GROUP == 0 for p in model.parameters() if p.ndim == 2)


def quantize_matrix(
    weight: Tensor, form: Form, arena: Arena | None = None
) -> tuple[Tensor, Tensor]:
    """Returns a matrix [N, K] as uint8 and bf16 scales, packed; kernels make them in the arena."""
    if isinstance(load_kernels(), str) or weight.dtype not in KERNEL_DTYPES:
        return pack(*(round_to_int8(weight) if form == "int8" else round_to_int4(weight)), form)
    num_rows, num_columns = weight.shape
    num_blocks = -(-num_rows // BLOCK_ROWS)
    num_words, group = (
        (num_columns // 4, _INT8_GROUP) if form == "int8" else (num_columns // 8, _INT4_GROUP)
    )
    arena = arena or Arena()
    stored = arena.empty(num_blocks, num_words, BLOCK_ROWS, 4, dtype=torch.uint8)
    scales = arena.empty(num_blocks, num_columns // group, BLOCK_ROWS, dtype=torch.bfloat16)
    quantize(weight, stored, scales, form)
    return stored, scales


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


def pack(numbers: Tensor, scales: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Returns numbers int8 [N, K] and scales [N, G] as the kernels read them."""
    missing = -len(numbers) % BLOCK_ROWS
    unsigned = F.pad(numbers.short() + _OFFSETS[form], (0, 0, 0, missing), value=_OFFSETS[form])
    blocks = unsigned.to(torch.uint8).unflatten(0, (-1, BLOCK_ROWS))  # n 16 K
    if form == "int8":
        stored = blocks.unflatten(-1, (-1, 4)).transpose(1, 2)
    else:
        words = blocks.unflatten(-1, (-1, 2, 4)).transpose(1, 2)  # n K/8 16 2 4
        stored = words[..., 0, :] | words[..., 1, :] << 4
    scales = F.pad(scales, (0, 0, 0, missing)).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)
    return stored.contiguous(), scales.contiguous()


def dequantize(matrix: Matrix) -> Tensor:
    """Returns a packed matrix as fp32 [N, K]."""
    stored, scales = matrix.stored, cast(Tensor, matrix.scales)
    if matrix.form == "int4":
        stored = torch.stack([stored & 15, stored >> 4], -2).flatten(3)  # n K/8 16 8
    numbers = stored.transpose(1, 2).flatten(2).float() - _OFFSETS[matrix.form]  # n 16 K
    groups = numbers.unflatten(-1, (scales.shape[1], -1))
    whole = groups * scales.float().transpose(1, 2)[..., None]
    return whole.flatten(2).flatten(0, 1)[: matrix.num_rows]


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 0, 1 / scale)
