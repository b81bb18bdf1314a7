"""Matrix products of fp32, faster than torch's where a CPU has matrix units (AMX), no less exact.

The units take bf16 only; native/product.cpp says how fp32 is made of it. Elsewhere, and for
products too small to gain, these functions are torch's.
Shapes: M rows, N columns, K of the sum.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kiem.native import Signatures, load_library

_SOURCE = Path(__file__).with_name("native") / "product.cpp"
_SIGNATURES: Signatures = {
    "kiem_may_multiply": [ctypes.POINTER(ctypes.c_long)],
    "kiem_multiply": [
        *(ctypes.c_void_p, ctypes.c_long, ctypes.c_long),
        *(ctypes.c_void_p, ctypes.c_long, ctypes.c_long),
        *(ctypes.c_void_p, ctypes.c_long),
        *5 * [ctypes.c_long],
    ],
}
# Products of fewer rows or columns, or of fewer multiplications, are as fast in torch: the factors
# are packed before they are multiplied.
_FEWEST_LINES, _FEWEST_MULTIPLICATIONS = 256, 1 << 25


class Linear(nn.Linear):
    """A linear layer without bias, by `multiply` where that may be faster."""

    def __init__(self, num_inputs: int, num_outputs: int):
        super().__init__(num_inputs, num_outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if torch.is_autocast_enabled("cpu") or not _may_gain(rows, self.weight.T):
            return F.linear(x, self.weight)
        return multiply(rows, self.weight.T).unflatten(0, x.shape[:-1])


@torch.library.custom_op("kiem::multiply", mutates_args=())
def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b for fp32 [M, K] and [K, N] on a CPU; differentiable, also in torch.compile.

    On matrix units a sum is made in an order that depends on K alone.
    """
    out = a.new_empty(a.shape[0], b.shape[1])
    multiply_into(out, a, b)
    return out


@multiply.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad
    of_a = multiply(gradient, b.T) if needs_a else None
    # Of a weight, which is b's transpose, so its gradient lies as the weight does.
    of_b = multiply(gradient.T, a).T if needs_b else None
    return of_a, of_b


multiply.register_autograd(_differentiate, setup_context=_keep_factors)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """Writes a @ b to `out`, or adds it.

    Args:
        out: [M, N], of any type.
        a, b: [M, K] and [K, N] of one type, whose precision the product has.
        add: whether to add to what is in `out`.
    """
    fits = _may_gain(a, b) and out.dtype == torch.float32 and out.stride(1) == 1
    if fits and isinstance(split_products(), ctypes.CDLL):
        _multiply_on_units(out, a, b, add)
    elif out.dtype == a.dtype:
        out.addmm_(a, b, beta=1 if add else 0)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


# An operation of torch, so that tensors without data (training/dry_run.py) do not get here.
@torch.library.custom_op("kiem::multiply_on_units", mutates_args=("out",))
def _multiply_on_units(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    library = split_products()
    assert isinstance(library, ctypes.CDLL), library
    a, b = _dense(a), _dense(b)
    factors = (a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride())
    shape = (*out.shape, a.shape[1])
    library.kiem_multiply(
        *factors, out.data_ptr(), out.stride(0), *shape, add, torch.get_num_threads()
    )


@_multiply_on_units.register_fake
def _(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    del out, a, b, add


@functools.cache
def split_products() -> ctypes.CDLL | str | None:
    """Returns the compiled products, a sentence that says why there are none, or None.

    None: this processor has no matrix units, or the system keeps them from this process.
    """
    if not torch.cpu.get_capabilities().get("amx_bf16", False):
        return None
    library = load_library(_SOURCE, _SIGNATURES)
    if isinstance(library, str):
        return library
    may = ctypes.c_long()
    library.kiem_may_multiply(ctypes.byref(may))
    return library if may.value else None


def _may_gain(a: Tensor, b: Tensor) -> bool:
    """Says whether a product of [M, K] and [K, N] is one that matrix units might do faster."""
    are_fp32 = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (a, b))
    rows, columns = a.shape[0], b.shape[1]
    is_large = rows * columns * a.shape[1] >= _FEWEST_MULTIPLICATIONS
    return are_fp32 and is_large and min(rows, columns) >= _FEWEST_LINES


def _dense(factor: Tensor) -> Tensor:
    """Returns the factor, or a copy if neither its rows nor its columns are dense."""
    return factor if 1 in factor.stride() else factor.contiguous()
