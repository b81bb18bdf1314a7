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

    def struct(self) -> _Weight:
        """Returns it for C++."""
        return _Weight(self.data.data_ptr(), _address(self.scales), self.num_rows)


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


# The structs of the same names in cpp/linear.h and cpp/layer.h.
class _Weight(ctypes.Structure):
    _fields_ = (*_fields(ctypes.c_void_p, "data scales"), ("num_rows", ctypes.c_long))


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weights", _Weight * 3),
        *_fields(ctypes.c_void_p, "norm_before norm_after"),
        *_fields(ctypes.c_long, "num_weights k format is_gated is_bf16 y_is_fp32"),
        ("eps", ctypes.c_float),
    )


class Layer(ctypes.Structure):
    """A decoder layer; it does not keep alive what it points to.

    Attributes:
        qkv, o_proj, gate_up, down: `Linear.struct` of the products with the norms around them.
        q_norm, k_norm: addresses of the weights of the norms of queries and keys.
        num_heads, num_kv_heads, head_dim: of the attention.
        scale: of its scores.
    """

    _fields_ = (
        *_fields(_Linear, "qkv o_proj gate_up down"),
        *_fields(ctypes.c_void_p, "q_norm k_norm"),
        *_fields(ctypes.c_long, "num_heads num_kv_heads head_dim"),
        ("scale", ctypes.c_float),
    )


class _LayerCache(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "keys values"),
        *_fields(ctypes.c_long, "num_entries is_sliding"),
    )


class _TextModel(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "layers norm"),
        ("num_layers", ctypes.c_long),
        ("eps", ctypes.c_float),
    )


class Linear:
    """The product of few rows with one to three matrices side by side, and the norms around it.

    Args:
        weights: of the same format and width.
        dtype: of x and the norms, and of the result unless that is asked for in fp32.
        is_gated: the result is the GELU of the first matrix's times the second's.
        norm_before: weights of a norm of x, [K].
        norm_after: weights of a norm of the result, [N].
        eps: of the norms.
        in_fp32: whether the result is fp32.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        dtype: torch.dtype,
        *,
        is_gated: bool = False,
        norm_before: Tensor | None = None,
        norm_after: Tensor | None = None,
        eps: float = 0.0,
        in_fp32: bool = False,
    ):
        self._kernels = kernels()
        self._kept = weights, norm_before, norm_after  # the struct has only their addresses
        self._dtype = torch.float32 if in_fp32 else dtype
        self._num_rows = sum(w.num_rows for w in (weights[:1] if is_gated else weights))
        first = weights[0]
        assert all(w[3:] == first[3:] and w.data.is_contiguous() for w in weights)
        self.struct = _Linear(
            weights=tuple(weight.struct() for weight in weights),
            norm_before=_address(norm_before),
            norm_after=_address(norm_after),
            num_weights=len(weights),
            k=first.num_columns,
            format=_FORMATS[first.format],
            is_gated=is_gated,
            is_bf16=dtype == torch.bfloat16,
            y_is_fp32=self._dtype == torch.float32,
            eps=eps,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the result [..., N] of x [..., K]; contiguous."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._num_rows), dtype=self._dtype)
        pointers = ctypes.byref(self.struct), x.data_ptr(), y.data_ptr()
        self._kernels.kiem_linear(*pointers, x.numel() // x.shape[-1])
        return y


class Layers:
    """All layers and the last norm, for one new token in each of B sequences, in one call.

    Args:
        layers: from the first to the last.
        norm: weights of the last norm, [D].
        eps: of that norm.
        kept: the tensors that the layers point to.
    """

    def __init__(self, layers: Sequence[Layer], norm: Tensor, eps: float, kept: Sequence[Tensor]):
        self._kernels = kernels()
        self._kept = norm, kept
        self._layers = (Layer * len(layers))(*layers)
        address = ctypes.addressof(self._layers)
        self._struct = _TextModel(address, norm.data_ptr(), len(layers), eps)

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        caches: Sequence[tuple[Tensor, Tensor, bool]],
        positions: Tensor,
        first_slot: int,
    ) -> None:
        """Replaces x [B, 1, D] by the normed output of the last layer; writes into the cache.

        Args:
            x: the tokens' input, contiguous.
            rotary: cosines and sines at their positions, fp32 [2, B, C / 2], contiguous, of full
                layers and of sliding ones.
            caches: for each layer, keys and values of all slots [N, K, S, C], and whether it is a
                sliding layer.
            positions: int64, B values, contiguous.
            first_slot: the slot of the first sequence; the others follow it.
        """
        structs = (_LayerCache * len(caches))(
            *(
                _LayerCache(keys.data_ptr(), values.data_ptr(), keys.shape[2], is_sliding)
                for keys, values, is_sliding in caches
            )
        )
        pointers = (tensor.data_ptr() for tensor in (x, *rotary, positions))
        self._kernels.kiem_layers(
            ctypes.byref(self._struct), structs, *pointers, len(x), first_slot
        )


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
