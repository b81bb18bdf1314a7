"""Weights for decoding on a CPU: as stored, or quantized to 8 or 4 bits in groups.

Both are symmetric: a weight is a whole number times its group's scale, which is bf16. int8 has a
scale for every 128 weights of a row, the largest magnitude / 127; int4 one for every 64, the one of
seven candidates with the least squared error (numbers -8 to 7). The embedding, which is also the
output layer, is quantized like the matrices; norms stay as they are. Shapes:

    N output features (rows)    K input features    G groups of a row

Numbers are packed for the kernels in blocks of 16 rows, the last one filled up: int8 are [N / 16,
K / 4, 16, 4]; int4 [N / 16, K / 8, 16, 4], two in a byte, of eight the first four in the lower
halves. An offset makes them unsigned. Scales are [N / 16, G, 16].
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.compute.kernels import (
    BITS,
    Format,
    Linear,
    Weight,
    describe_linear,
    kernels,
    weight_struct,
)
from kiem.compute.speed import prefers_bf16

# With more tokens of a sequence, arithmetic is the limit and not memory. The number of sequences
# does not count: with the kernel none of them depends on how many others there are.
MAX_TOKENS = 16
_BLOCK_ROWS = 16
_GROUPS: dict[Format, int] = {"int8": 128, "int4": 64}
_PAGE_BYTES = 2 << 20
_MAPPED_BYTES = 64 << 20


class KernelLinear(nn.Module):
    """Products with a matrix [N, K] in one of the formats.

    Args:
        packed: the matrix.
        dtype: fp32 or bf16, of the activations.
        in_fp32: whether results are fp32.
    """

    def __init__(self, packed: Weight, dtype: torch.dtype, *, in_fp32: bool = False):
        super().__init__()
        self.packed = packed
        self.dtype = dtype
        self.in_fp32 = in_fp32
        self.register_buffer("data", packed.data)
        self.register_buffer("scales", packed.scales)
        self._struct = describe_linear([packed], dtype, in_fp32=in_fp32)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x @ weight.T, [B, T, N] or [B, N], of x [B, T, K] or [B, K]."""
        dtype = torch.float32 if self.in_fp32 else self.dtype
        if not self.is_fast(x):
            return self._by_torch(x).to(dtype)
        y = x.new_empty((*x.shape[:-1], self.packed.num_rows), dtype=dtype)
        multiply(self._struct, x, y)
        return y

    def is_fast(self, x: Tensor) -> bool:
        """Says whether the kernels multiply x faster than torch.

        With many tokens that is what instructions decide: torch uses those for bf16, and is as fast
        as can be in fp32.
        """
        if x.ndim < 3 or x.shape[1] <= MAX_TOKENS:
            return True
        return self.packed.format in BITS and not prefers_bf16(x.device)

    def _by_torch(self, x: Tensor) -> Tensor:
        """Returns x @ weight.T, in fp32 where bf16 is slow."""
        if prefers_bf16(x.device):
            return F.linear(x, self.rows(None))
        return F.linear(x.float(), self.packed.data.float())

    def rows(self, ids: Tensor | None) -> Tensor:
        """Returns rows int64 [n], or all, in the precision of the activations."""
        data, scales, num_rows, num_columns, format = self.packed
        if scales is None:
            return (data if ids is None else data[ids]).to(self.dtype)
        out = torch.empty(num_rows if ids is None else len(ids), num_columns, dtype=self.dtype)
        kernels().kiem_dequantize(
            ctypes.byref(weight_struct(self.packed)),
            None if ids is None else ids.data_ptr(),
            out.data_ptr(),
            *out.shape,
            BITS[format],
            self.dtype == torch.bfloat16,
        )
        return out


class KernelMLP(nn.Module):
    """A gated feed-forward block whose matrices are for the kernels."""

    def __init__(self, gate_proj: KernelLinear, up_proj: KernelLinear, down_proj: KernelLinear):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        weights = [gate_proj.packed, up_proj.packed]
        self._gate_up = describe_linear(weights, gate_proj.dtype, is_gated=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj.is_fast(x):
            hidden = x.new_empty(*x.shape[:-1], self.gate_proj.packed.num_rows)
            multiply(self._gate_up, x, hidden)
        else:
            hidden, up = self.gate_proj(x), self.up_proj(x)
            if x.dtype == torch.float32:  # twice as fast as torch's GELU
                kernels().kiem_gate(hidden.data_ptr(), up.data_ptr(), hidden.numel())
            else:
                hidden = F.gelu(hidden, approximate="tanh").mul_(up)
        return self.down_proj(hidden)


class KernelEmbedding(nn.Module):
    """The embedding, which is also the output layer."""

    def __init__(self, packed: Weight, dtype: torch.dtype):
        super().__init__()
        self.linear = KernelLinear(packed, dtype, in_fp32=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the rows of token ids [...], [..., K]."""
        return self.linear.rows(ids.flatten()).unflatten(0, ids.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits [B, N] of hidden states [B, K]."""
        return self.linear(hidden)


def multiply(linear: Linear, x: Tensor, y: Tensor) -> None:
    """Writes the product of x [..., K] into y [..., N], which must be contiguous."""
    x = x.contiguous()
    kernels().kiem_linear(
        ctypes.byref(linear), x.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1]
    )


def pack_weight(weight: Tensor, format: Format, pages: LargePages) -> Weight:
    """Returns a matrix as the kernels read it.

    Args:
        weight: [N, K], in fp32 or bf16; K a multiple of 32, of 128 for int8 and int4.
        format: to keep it in; fp32 and bf16 keep `weight` itself.
        pages: where quantized weights go.
    """
    data, scales = quantize(weight, format, pages) if format in BITS else (weight, None)
    return Weight(data, scales, weight.shape[0], weight.shape[1], format)


def quantize(weight: Tensor, format: Format, pages: LargePages) -> tuple[Tensor, Tensor]:
    """Returns a matrix [N, K] of fp32 or bf16 as packed numbers (uint8) and bf16 scales."""
    (num_rows, num_columns), bits = weight.shape, BITS[format]
    num_blocks, num_groups = -(-num_rows // _BLOCK_ROWS), num_columns // _GROUPS[format]
    data = pages.empty(num_blocks, num_columns * bits // 32, _BLOCK_ROWS, 4)
    scales = torch.empty(num_blocks, num_groups, _BLOCK_ROWS, dtype=torch.bfloat16)
    weight = weight.contiguous()
    pointers = weight.data_ptr(), data.data_ptr(), scales.data_ptr()
    is_bf16 = weight.dtype == torch.bfloat16
    kernels().kiem_quantize(*pointers, num_rows, num_columns, bits, is_bf16)
    return data, scales


class LargePages:
    """Memory for tensors side by side, on pages of 2 MB where the system has them.

    A token reads all weights. On pages of 4 kB the processor looks up so many addresses that this
    takes a sixth longer (docs/decisions.md). A block is freed with the last tensor in it.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int) -> Tensor:
        """Returns a new uint8 tensor."""
        num_bytes = math.prod(shape)
        if num_bytes > len(self._free):
            size = max(num_bytes, _MAPPED_BYTES)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            mapped = mmap.mmap(-1, size + _PAGE_BYTES, flags=flags)
            with contextlib.suppress(OSError, AttributeError):
                mapped.madvise(mmap.MADV_HUGEPAGE)
            memory = torch.frombuffer(mapped, dtype=torch.uint8)
            self._free = memory[-memory.data_ptr() % _PAGE_BYTES :][:size]
        taken, self._free = self._free[:num_bytes], self._free[num_bytes:]
        return taken.view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """Returns a copy of a uint8 tensor."""
        return self.empty(*tensor.shape).copy_(tensor)
