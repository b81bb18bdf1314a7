"""Calls into cpp/kernels.cpp: what decoding computes on a CPU.

torch's own kernels leave a large part of the memory's bandwidth unused (docs/decisions.md).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kiem.compute.native import Signatures, load_library

Format = Literal["fp32", "bf16", "int8", "int4"]
_FORMATS: dict[Format, int] = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
BITS: dict[Format, int] = {"int8": 8, "int4": 4}
SOURCE = Path(__file__).with_name("cpp") / "kernels.cpp"
SIGNATURES: Signatures = {
    "kiem_linear": [*3 * [ctypes.c_void_p], ctypes.c_long],
    "kiem_gate": [*2 * [ctypes.c_void_p], ctypes.c_long],
    "kiem_layers": [*6 * [ctypes.c_void_p], *2 * [ctypes.c_long]],
    "kiem_quantize": [*3 * [ctypes.c_void_p], *4 * [ctypes.c_long]],
    "kiem_dequantize": [*3 * [ctypes.c_void_p], *4 * [ctypes.c_long]],
}


class Weight(NamedTuple):
    """A matrix [N, K] as the kernels read it.

    Attributes:
        data: fp32 or bf16 [N, K], or whole numbers packed as kiem/compute/quantize.py describes.
        scales: bf16, of int8 and int4.
        num_rows: N.
        num_columns: K.
        format: of the data.
    """

    data: Tensor
    scales: Tensor | None
    num_rows: int
    num_columns: int
    format: Format


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


# The structs of the same names in cpp/linear.h and cpp/layer.h. They keep nothing alive.
class WeightStruct(ctypes.Structure):
    """A `Weight`."""

    _fields_ = (*_fields(ctypes.c_void_p, "data scales"), ("num_rows", ctypes.c_long))


class Linear(ctypes.Structure):
    """The product of few rows with one to three matrices side by side, and the norms around it."""

    _fields_ = (
        ("weights", WeightStruct * 3),
        *_fields(ctypes.c_void_p, "norm_before norm_after"),
        *_fields(ctypes.c_long, "num_weights k format is_gated is_bf16 y_is_fp32"),
        ("eps", ctypes.c_float),
    )


class Layer(ctypes.Structure):
    """A decoder layer: its products, the weights of two norms, and the shape of its attention."""

    _fields_ = (
        *_fields(Linear, "qkv o_proj gate_up down"),
        *_fields(ctypes.c_void_p, "q_norm k_norm"),
        *_fields(ctypes.c_long, "num_heads num_kv_heads head_dim"),
        ("scale", ctypes.c_float),
    )


class LayerCache(ctypes.Structure):
    """Keys and values of a layer, all slots."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "keys values"),
        *_fields(ctypes.c_long, "num_entries is_sliding"),
    )


class TextModel(ctypes.Structure):
    """All layers, and the weights of the last norm."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "layers norm"),
        ("num_layers", ctypes.c_long),
        ("eps", ctypes.c_float),
    )


def describe_linear(
    weights: Sequence[Weight],
    dtype: torch.dtype,
    *,
    is_gated: bool = False,
    norm_before: Tensor | None = None,
    norm_after: Tensor | None = None,
    eps: float = 0.0,
    in_fp32: bool = False,
) -> Linear:
    """Returns the struct of a product.

    Args:
        weights: of the same format and width; they and the norms must live as long as the struct.
        dtype: of x and the norms, and of the result unless that is asked for in fp32.
        is_gated: the result is the GELU of the first matrix's times the second's.
        norm_before: weights of a norm of x, [K].
        norm_after: weights of a norm of the result, [N].
        eps: of the norms.
        in_fp32: whether the result is fp32.
    """
    first = weights[0]
    assert all(w[3:] == first[3:] and w.data.is_contiguous() for w in weights)
    return Linear(
        weights=tuple(weight_struct(weight) for weight in weights),
        norm_before=_address(norm_before),
        norm_after=_address(norm_after),
        num_weights=len(weights),
        k=first.num_columns,
        format=_FORMATS[first.format],
        is_gated=is_gated,
        is_bf16=dtype == torch.bfloat16,
        y_is_fp32=in_fp32 or dtype == torch.float32,
        eps=eps,
    )


def weight_struct(weight: Weight) -> WeightStruct:
    """Returns the struct of a matrix, which must live as long."""
    return WeightStruct(weight.data.data_ptr(), _address(weight.scales), weight.num_rows)


@functools.cache
def load_kernels() -> ctypes.CDLL | str:
    """Returns the compiled kernels, or a sentence that says why there are none."""
    return load_library(SOURCE, SIGNATURES)


def kernels() -> ctypes.CDLL:
    """Returns the compiled kernels, where `load_kernels` has found that there are some."""
    found = load_kernels()
    assert not isinstance(found, str), found
    return found


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
