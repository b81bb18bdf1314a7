"""Compiles and loads kernels.cpp: what decoding does on the CPU.

torch's own leave a large part of the memory's bandwidth unused (docs/decisions.md). The compiled
library is kept in the user's cache folder, under a name that says what it was made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kiem.errors import UserError
from kiem.files import write_bytes

Form = Literal["fp32", "bf16", "int8", "int4"]
_NUMBERS: dict[Form, int] = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


@functools.cache
def load_kernels() -> ctypes.CDLL | str:
    """Returns the compiled kernels, or a sentence that says why there are none."""
    compiler = os.environ.get("CXX", "g++")
    try:
        asked = subprocess.run([compiler, "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"there is no working C++ compiler {compiler!r}; install one or set CXX"
    recipe = b"\n".join(
        [_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), asked.stdout, _processor()]
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kiem"
    kept = cache / f"kernels-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
    if kept.exists():
        return _open(kept)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / kept.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{compiler} cannot compile {_SOURCE.name}: {done.stderr.strip()[:300]}"
        # A cache that cannot be written to costs the seconds of compiling each time, no more.
        with contextlib.suppress(UserError, OSError):
            cache.mkdir(parents=True, exist_ok=True)
            write_bytes(kept, made.read_bytes())
        return _open(made)


def linear(x: Tensor, weights: Tensor, scales: Tensor | None, form: Form, dtype: Any) -> Tensor:
    """Returns x @ weights.T of a few rows, each summed up in an order of its own.

    Args:
        x: fp32 or bf16 [..., K].
        weights: [N, K] in the form `form`: packed as `quantize` makes them, or as they are.
        scales: bf16, of int8 and int4.
        form: what the weights are stored in.
        dtype: torch.float32 or torch.bfloat16, of the result [..., N].
    """
    kernels = load_kernels()
    assert not isinstance(kernels, str), kernels
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], len(weights), dtype=dtype)
    kernels.kiem_linear(
        x.data_ptr(),
        weights.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        y.data_ptr(),
        x.numel() // x.shape[-1],
        len(weights),
        x.shape[-1],
        _NUMBERS[form],
        x.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
    )
    return y


def unpack(weights: Tensor, scales: Tensor, num_columns: int, form: Form, dtype: Any) -> Tensor:
    """Returns int8 or int4 weights as fp32 or bf16 [N, K]."""
    kernels = load_kernels()
    assert not isinstance(kernels, str), kernels
    out = torch.empty(len(weights), num_columns, dtype=dtype)
    pointers = weights.data_ptr(), scales.data_ptr(), out.data_ptr()
    shape = len(weights), num_columns
    kernels.kiem_unpack(*pointers, *shape, _NUMBERS[form], dtype == torch.bfloat16)
    return out


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Returns the root mean square norm of x [..., D] with gain 1 + `gain` [D], of one dtype."""
    kernels = load_kernels()
    assert not isinstance(kernels, str), kernels
    x = x.contiguous()
    y = torch.empty_like(x)
    shape = x.numel() // len(gain), len(gain)
    is_bf16 = x.dtype == torch.bfloat16
    kernels.kiem_norm(x.data_ptr(), gain.data_ptr(), y.data_ptr(), *shape, eps, is_bf16)
    return y


def attend(
    projected: tuple[Tensor, Tensor, Tensor],
    gains: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    positions: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    """Returns the attention of one new token in each of B slots, and puts it into their cache.

    Args:
        projected: query [B, 1, H * C], key and value [B, 1, K * C], as the matrices give them.
        gains: of the norms of query and key, [C].
        rotary: cosines and sines at the tokens' positions, fp32 with B * C values.
        cache: keys and values of the slots, [B, K, S, C].
        positions: int64, B values.
        eps, scale: of the norms and of the scores.
    """
    kernels = load_kernels()
    assert not isinstance(kernels, str), kernels
    num_rows, num_kv_heads, num_entries, head_dim = cache[0].shape
    tensors = [*projected, *gains, *rotary, *cache, positions]
    assert all(tensor.is_contiguous() for tensor in tensors)
    out = torch.empty_like(projected[0])
    kernels.kiem_attend(
        *(tensor.data_ptr() for tensor in [*tensors, out]),
        *(num_rows, out.shape[-1] // head_dim, num_kv_heads, head_dim, num_entries),
        *(eps, scale, out.dtype == torch.bfloat16),
    )
    return out


def _open(library: Path) -> ctypes.CDLL | str:
    try:
        kernels = ctypes.CDLL(str(library))
    except OSError as error:
        return f"the compiled kernels cannot be loaded ({error})"
    pointer, number = ctypes.c_void_p, ctypes.c_long
    kernels.kiem_linear.argtypes = [pointer] * 4 + [number] * 6
    kernels.kiem_linear.restype = None
    kernels.kiem_unpack.argtypes = [pointer] * 3 + [number] * 4
    kernels.kiem_unpack.restype = None
    real = ctypes.c_float
    kernels.kiem_norm.argtypes = [pointer] * 3 + [number] * 2 + [real, number]
    kernels.kiem_norm.restype = None
    kernels.kiem_attend.argtypes = [pointer] * 11 + [number] * 5 + [real, real, number]
    kernels.kiem_attend.restype = None
    return kernels


def _processor() -> bytes:
    """Returns what tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith("flags")), platform.machine()).encode()
