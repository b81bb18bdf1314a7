"""Calls native/kernels.cpp: what decoding does on the CPU.

torch's own leave a large part of the memory's bandwidth unused (docs/decisions.md).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kiem.compute.native import Signatures, load_library
from kiem.model.cache import LayerCache

Form = Literal["fp32", "bf16", "int8", "int4"]
# Rows of int8 and int4 matrices lie interleaved in blocks of so many.
BLOCK_ROWS = 16
_NUMBERS: dict[Form, int] = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
_BITS: dict[Form, int] = {"int8": 8, "int4": 4}
SOURCE = Path(__file__).with_name("cpp") / "kernels.cpp"
SIGNATURES: Signatures = {
    "kiem_linear": [*4 * [ctypes.c_void_p], ctypes.c_long],
    "kiem_layers": [*6 * [ctypes.c_void_p], *2 * [ctypes.c_long]],
    "kiem_quantize": [*3 * [ctypes.c_void_p], *4 * [ctypes.c_long]],
    "kiem_unpack": [*3 * [ctypes.c_void_p], *4 * [ctypes.c_long]],
}


class Matrix(NamedTuple):
    """A matrix [N, K] as the kernels read it.

    Attributes:
        stored: fp32 or bf16 [N, K], or whole numbers as kiem/compute/quantize.py packs them.
        scales: bf16, of int8 and int4.
        num_rows: N.
        num_columns: K.
        form: what the weights are stored in.
    """

    stored: Tensor
    scales: Tensor | None
    num_rows: int
    num_columns: int
    form: Form


class _Matrix(ctypes.Structure):
    """The struct Matrix of native/linear.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_rows", ctypes.c_long),
    )


class _Product(ctypes.Structure):
    """The struct Product of native/linear.h."""

    _fields_ = (
        ("matrices", _Matrix * 3),
        ("gain_before", ctypes.c_void_p),
        ("gain_after", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("num_matrices", "k", "format")),
        *((name, ctypes.c_long) for name in ("is_gated", "is_bf16", "y_is_fp32")),
        ("eps", ctypes.c_float),
    )


class _Layer(ctypes.Structure):
    """The struct Layer of native/layer.h."""

    _fields_ = (
        *((name, _Product) for name in ("project", "join", "widen", "narrow")),
        *((name, ctypes.c_void_p) for name in ("q_gain", "k_gain")),
        *((name, ctypes.c_long) for name in ("num_heads", "num_kv_heads", "c")),
        ("scale", ctypes.c_float),
    )


class _Held(ctypes.Structure):
    """The struct Held of native/layer.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_long) for name in ("num_entries", "is_sliding")),
    )


class _Body(ctypes.Structure):
    """The struct TextModel of native/layer.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "gain")),
        ("num_layers", ctypes.c_long),
        ("eps", ctypes.c_float),
    )


class Product:
    """The product of few rows with one or several matrices, and what stands around it, in one call.

    Attributes:
        struct: it, for C++; alive as long as this object.

    Args:
        matrices: one to three of the same form and width; their results stand side by side.
        dtype: of x, gains and residual, and of the result unless that is asked for in fp32.
        is_gated: the result is the GELU of the first matrix's times the second's.
        gain_before: of a norm of x, [K].
        gain_after: of a norm of the result, [N].
        eps: of the norms.
        in_fp32: whether the result is fp32.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        dtype: torch.dtype,
        *,
        is_gated: bool = False,
        gain_before: Tensor | None = None,
        gain_after: Tensor | None = None,
        eps: float = 0.0,
        in_fp32: bool = False,
    ):
        self._kernels = kernels()
        self._kept = matrices, gain_before, gain_after  # the struct has but their addresses
        self._dtype = torch.float32 if in_fp32 else dtype
        self._num_rows = sum(m.num_rows for m in (matrices[:1] if is_gated else matrices))
        first = matrices[0]
        assert all(m[3:] == first[3:] and m.stored.is_contiguous() for m in matrices)
        self.struct = _Product(
            matrices=tuple(map(_struct, matrices)),
            gain_before=_address(gain_before),
            gain_after=_address(gain_after),
            num_matrices=len(matrices),
            k=first.num_columns,
            format=_NUMBERS[first.form],
            is_gated=is_gated,
            is_bf16=dtype == torch.bfloat16,
            y_is_fp32=self._dtype == torch.float32,
            eps=eps,
        )
        self._pointer = ctypes.byref(self.struct)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the result [..., N] of x [..., K], plus `residual` [..., N]; contiguous."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._num_rows), dtype=self._dtype)
        num_rows = x.numel() // x.shape[-1]
        self._kernels.kiem_linear(
            self._pointer, x.data_ptr(), _address(residual), y.data_ptr(), num_rows
        )
        return y


class LayerKernel:
    """All that a layer does to one new token in each of B sequences.

    Attributes:
        struct: it, for C++; alive as long as this object.

    Args:
        products: queries, keys and values of the normed input; the attention's output; gate times
            up; what narrows that again.
        gains: of the norms of queries and keys, [C].
        num_kv_heads: key and value heads.
        scale: of the attention's scores.
    """

    def __init__(
        self,
        products: tuple[Product, Product, Product, Product],
        gains: tuple[Tensor, Tensor],
        num_kv_heads: int,
        scale: float,
    ):
        self._kept = products, gains
        head_dim = len(gains[0])
        self.struct = _Layer(
            *(product.struct for product in products),
            *map(_address, gains),
            products[1].struct.k // head_dim,
            num_kv_heads,
            head_dim,
            scale,
        )


class LayerKernels:
    """All layers and the last norm, in one call.

    Args:
        layers: from the first to the last.
        gain: of the last norm, [D].
        eps: of that norm.
    """

    def __init__(self, layers: Sequence[LayerKernel], gain: Tensor, eps: float):
        self._kernels = kernels()
        self._kept = layers, gain
        self._layers = (ctypes.c_void_p * len(layers))(
            *(ctypes.addressof(layer.struct) for layer in layers)
        )
        self._body = _Body(ctypes.addressof(self._layers), gain.data_ptr(), len(layers), eps)
        self._pointer = ctypes.byref(self._body)
        self._held = _Held * len(layers)

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Sequence[LayerCache],
        positions: Tensor,
        first_slot: int,
    ) -> None:
        """Replaces x [B, 1, D] by the normed output of the last layer; writes into the cache.

        Args:
            x: the tokens' input, contiguous.
            rotary: cosines and sines at their positions, fp32 [2, B, C / 2], contiguous, of full
                layers and of sliding ones.
            cache: keys and values of all slots, by layer.
            positions: int64, B values, contiguous.
            first_slot: the slot of the first sequence; the others follow it.
        """
        held = [
            _Held(
                layer.keys.data_ptr(),
                layer.values.data_ptr(),
                layer.keys.shape[2],
                layer.is_sliding,
            )
            for layer in cache
        ]
        pointers = (tensor.data_ptr() for tensor in (x, *rotary, positions))
        self._kernels.kiem_layers(self._pointer, self._held(*held), *pointers, len(x), first_slot)


def quantize(weight: Tensor, stored: Tensor, scales: Tensor, form: Form) -> None:
    """Rounds a matrix [N, K] of fp32 or bf16 into `stored` and `scales`."""
    shape = weight.shape[0], weight.shape[1]
    weight = weight.contiguous()
    pointers = weight.data_ptr(), stored.data_ptr(), scales.data_ptr()
    kernels().kiem_quantize(*pointers, *shape, _BITS[form], weight.dtype == torch.bfloat16)


def unpack(matrix: Matrix, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns rows of an int8 or int4 matrix, those of int64 `ids` or all, as fp32 or bf16."""
    num_rows = matrix.num_rows if ids is None else len(ids)
    out = torch.empty(num_rows, matrix.num_columns, dtype=dtype)
    pointers = ctypes.byref(_struct(matrix)), _address(ids), out.data_ptr()
    shape = num_rows, matrix.num_columns
    kernels().kiem_unpack(*pointers, *shape, _BITS[matrix.form], dtype == torch.bfloat16)
    return out


def kernels() -> ctypes.CDLL:
    """Returns the compiled kernels, where `load_kernels` has found that there are some."""
    found = load_kernels()
    assert not isinstance(found, str), found
    return found


@functools.cache
def load_kernels() -> ctypes.CDLL | str:
    """Returns the compiled kernels, or a sentence that says why there are none."""
    return load_library(SOURCE, SIGNATURES)


def _struct(matrix: Matrix) -> _Matrix:
    return _Matrix(matrix.stored.data_ptr(), _address(matrix.scales), matrix.num_rows)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
