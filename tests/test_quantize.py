"""Weights for decoding: their quantization, and products with them."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch_quantize import dequantize, pack, round_to_int4, round_to_int8

from kiem.compute import kernels
from kiem.compute.kernels import Format, load_kernels
from kiem.compute.native import compile_library, load_library, open_library
from kiem.compute.quantize import KernelLinear, LargePages, pack_weight, quantize
from kiem.compute.speed import prefers_bf16
from kiem.inference.decoder import use_kernels
from kiem.model.cache import CachePass, KeyValueCache
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3, initialize

WINDOW = 8
SHAPE = Gemma3Config(
    vocab_size=131,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=WINDOW,
    query_pre_attn_scalar=32,
)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """With groups of very different size, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.rand(rows, columns // 128, generator=generator).repeat_interleave(128, 1) ** 4
    values[0, :128] = 0
    return values


def dequantized(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """Number times scale, the long way."""
    if format not in ("int8", "int4"):
        return weight.float()
    numbers, scales = round_to_int8(weight) if format == "int8" else round_to_int4(weight)
    return numbers * scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)


def as_multiplied(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Returns x in fp64; with int8 and int4 rounded, the largest of 32 values to 127."""
    if format not in ("int8", "int4"):
        return x.double()
    groups = x.float().unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    # Not 127 / most, which torch takes for 127 times the reciprocal.
    inverse = torch.full_like(most, 127) / most
    numbers = (groups * torch.where(most > 0, inverse, 0)).round()
    return (numbers.double() * (most / 127).double()).flatten(-2)


def test_kernels_are_compiled_here() -> None:
    assert not isinstance(load_kernels(), str), load_kernels()


def test_int8_is_within_half_a_step_of_the_weight() -> None:
    weight = matrix(40, 384)
    found = dequantized(weight, "int8")
    steps = weight.unflatten(1, (-1, 128)).abs().amax(-1).repeat_interleave(128, 1) / 127
    assert ((found - weight).abs() <= steps * 0.505 + 1e-30).all()


def test_int4_is_no_worse_than_the_usual_scale() -> None:
    """The usual one (as in Q4_0): the largest value becomes -8."""
    weight = matrix(40, 384)
    found = dequantized(weight, "int4")
    groups = weight.unflatten(1, (-1, 64))
    scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    usual = ((groups / scales).nan_to_num().round().clamp(-8, 7) * scales).flatten(1)
    errors = [(other - weight).square().sum() for other in (found, usual)]
    assert errors[0] < errors[1]
    assert (found[0, :128] == 0).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_round_weights_as_torch_does(format: Format, dtype: torch.dtype) -> None:
    """To the bit, for rows that fill no block and values of all sizes; and give them back."""
    weight = (matrix(131, 1152) * 10.0 ** torch.arange(-40, 91).clamp(max=37)[:, None]).to(dtype)
    weight[130] = weight[130].abs().amax()  # nothing but ties
    weight[129, ::2] *= -1
    data, scales = quantize(weight, format, LargePages())
    expected = pack(*(round_to_int8(weight) if format == "int8" else round_to_int4(weight)), format)
    assert torch.equal(data, expected[0])
    assert torch.equal(scales, expected[1])
    weights = KernelLinear(pack_weight(weight, format, LargePages()), dtype)
    whole = dequantize(weights.packed)
    assert torch.equal(whole, dequantized(weight, format))
    assert torch.equal(weights.rows(None), whole.to(dtype))
    chosen = torch.tensor([130, 0, 17, 17])
    assert torch.equal(weights.rows(chosen), whole[chosen].to(dtype))


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(131, 384), (48, 128), (7, 1152)])
def test_products_equal_those_with_the_rounded_weights(
    format: Format, shape: tuple[int, int]
) -> None:
    """And a row's result has the same bits whatever the others are, and however many."""
    weight = matrix(*shape)
    if format == "bf16":
        weight = weight.bfloat16()
    weights = KernelLinear(pack_weight(weight, format, LargePages()), torch.float32)
    in_bf16 = KernelLinear(pack_weight(weight, format, LargePages()), torch.bfloat16)
    logits = KernelLinear(pack_weight(weight, format, LargePages()), torch.bfloat16, in_fp32=True)
    whole = dequantized(weight, format).double().T
    for batch in (*range(1, 10), 16, 27):
        x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch))
        x[0, :32] = 0
        found = weights(x)
        expected = as_multiplied(x, format) @ whole
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
        for row in range(batch):
            assert torch.equal(found[row], weights(x[row : row + 1])[0])
        x = x.bfloat16()
        expected = as_multiplied(x, format) @ whole
        torch.testing.assert_close(in_bf16(x).double(), expected, rtol=2**-8, atol=2e-5)
        torch.testing.assert_close(logits(x).double(), expected, rtol=0, atol=2e-5)
        assert torch.equal(logits(x).bfloat16(), in_bf16(x))


@pytest.mark.parametrize("flags", ["-DKIEM_DOT4=0", "-march=x86-64-v3", "clang++"])
def test_every_processor_and_compiler_finds_the_same(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without instructions for whole numbers, without AVX-512, by another compiler: the same."""
    if "march" in flags and platform.machine() != "x86_64":
        pytest.skip("this is for x86-64")
    if flags == "clang++":
        if shutil.which(flags) is None:
            pytest.skip("needs clang: apt install clang libomp-dev")
        monkeypatch.setenv("CXX", flags)
        flags = "-O2"
    kinds: list[tuple[Format, torch.dtype]] = [
        ("int8", torch.float32),
        ("int4", torch.bfloat16),
        ("bf16", torch.bfloat16),
    ]
    x = torch.randn(9, 384, generator=torch.Generator().manual_seed(0))

    def results() -> list[torch.Tensor]:
        weights = [
            KernelLinear(pack_weight(matrix(131, 384).to(dtype), format, LargePages()), dtype)
            for format, dtype in kinds
        ]
        return [
            result for one in weights for result in (one.data, one(x.to(one.dtype)), one.rows(None))
        ]

    expected = results()
    library = tmp_path / "kernels.so"
    assert compile_library(kernels.SOURCE, library, "-O1", flags) is None
    other = open_library(library, kernels.SIGNATURES)
    monkeypatch.setattr(kernels, "load_kernels", lambda: other)
    for found, wanted in zip(results(), expected, strict=True):
        assert torch.equal(found, wanted)


def test_large_pages_give_each_tensor_memory_of_its_own() -> None:
    """Also those larger than a block, and when the allocator is gone before the tensors."""
    pages = LargePages()
    shapes = [(3, 64), (64,), (17, 1 << 22), (2, 1 << 20), (7, 64)]
    tensors = [pages.empty(*shape) for shape in shapes]
    del pages
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True), start=1):
        assert tensor.shape == shape
        assert tensor.data_ptr() % 64 == 0
        tensor[0] = tensor[-1] = number
    for number, tensor in enumerate(tensors, start=1):
        assert (tensor[0] == number).all()
        assert (tensor[-1] == number).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_many_rows_take_the_same_weights_as_few(format: Format) -> None:
    weights = KernelLinear(pack_weight(matrix(131, 384), format, LargePages()), torch.float32)
    x = torch.randn(1, 20, 384, generator=torch.Generator().manual_seed(0))
    rounded = as_multiplied(x, format).float()
    few = torch.cat([weights(x[:, :10]), weights(x[:, 10:])], 1)
    torch.testing.assert_close(weights(rounded), few, rtol=1e-5, atol=2e-5)


def test_a_model_stays_as_it_is_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gemma3(SHAPE)
    assert use_kernels(Gemma3(replace(SHAPE, hidden_size=144)), "int8") is not None
    monkeypatch.setattr("kiem.inference.decoder.load_kernels", lambda: "no compiler")
    assert use_kernels(model, "int4") == "no compiler"
    assert model.decoder is None
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_multiplied_in_fp32(stored: torch.dtype) -> None:
    """Those in bf16 are kept so: a token reads half the bytes."""
    model = Gemma3(SHAPE)
    initialize(model, seed=3)
    with torch.no_grad():  # so that a token's output depends on all it sees
        for parameter in model.parameters():
            parameter.mul_(4).add_(0.01)
        model.to(stored)
        plain = Gemma3(SHAPE)
        plain.load_state_dict(model.state_dict())
        assert use_kernels(model, "none", torch.float32) is None
        ids = torch.randint(0, 131, (2, 30), generator=torch.Generator().manual_seed(0))
        expected = plain.hidden_states(ids)
        torch.testing.assert_close(model.hidden_states(ids), expected, rtol=0, atol=1e-4)
        cache = KeyValueCache(SHAPE, 2, 30, model.dtype, ids.device)
        for at in range(30):
            where = CachePass(cache, 0, torch.full((2, 1), at), at + 1)
            found = model.hidden_states(ids[:, at : at + 1], cached=where)
            torch.testing.assert_close(found[:, 0], expected[:, at], rtol=0, atol=1e-4)
    kept = {buffer.dtype for buffer in model.buffers()}
    assert kept == {torch.bfloat16 if stored == torch.bfloat16 else torch.float32}


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_prepared_model_is_the_model_with_rounded_weights(quantize: str) -> None:
    model = Gemma3(SHAPE)
    initialize(model, seed=3)
    with torch.no_grad():  # so that a token's output depends on all it sees
        for parameter in model.parameters():
            parameter.mul_(4).add_(0.01)
    plain = Gemma3(SHAPE)
    plain.load_state_dict(model.state_dict())
    format: Format = "fp32" if quantize == "none" else quantize
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim == 2:
                parameter.copy_(dequantized(parameter, format))
        assert use_kernels(model, quantize) is None
        ids = torch.randint(0, 131, (2, 30), generator=torch.Generator().manual_seed(0))
        if quantize == "none" or prefers_bf16(ids.device):
            expected = plain.hidden_states(ids)
            torch.testing.assert_close(model.hidden_states(ids), expected, rtol=0, atol=1e-4)
        # Few tokens, and many on a processor without fast bf16: what is multiplied is rounded too,
        # and one last bit can move a number by one.
        for module in plain.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(
                    lambda _, inputs: as_multiplied(inputs[0], format).float()
                )
        expected = plain.hidden_states(ids)
        tolerance = 1e-4 if quantize == "none" else 2e-2
        if not prefers_bf16(ids.device):
            found = model.hidden_states(ids)
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        last = expected[:, -1]
        torch.testing.assert_close(
            model.logits(last), plain.logits(as_multiplied(last, format).float()), rtol=0, atol=1e-5
        )
        # One token in each of two slots, at places before, at and after the window.
        cache = KeyValueCache(SHAPE, 3, 30, torch.float32, torch.device("cpu"))
        starts = (WINDOW - 2, 2 * WINDOW)
        for slot, start in enumerate(starts, start=1):
            where = CachePass(cache, slot, torch.arange(start)[None], start)
            model.hidden_states(ids[slot - 1 : slot, :start], cached=where)
        for step in range(WINDOW):
            positions = torch.tensor(starts)[:, None] + step
            where = CachePass(cache, 1, positions, 30)
            found = model.hidden_states(ids.gather(1, positions), cached=where)[:, 0]
            wanted = expected[torch.arange(2), positions[:, 0]]
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("compiler", "code", "said"),
    [
        ("env g++", "void f() {}", ""),
        ("", "void f() {}", ""),
        ("/nonexistent -x", "void f() {}", "no working C++ compiler '/nonexistent -x'; install"),
        ("false", "void f() {}", "no working C++ compiler 'false'; install"),
        ("true", "void f() {}", "cannot be loaded"),
        ("env g++", "int x;\n#include <no-file.h>", "env g++ cannot compile part.cpp: "),
        ("g++ -nostdinc", "\n#include <omp.h>", "g++ -nostdinc lacks OpenMP; install libomp"),
    ],
)
def test_any_compiler_is_used_or_named_in_one_line(
    compiler: str, code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "part.cpp"
    source.write_text(f'extern "C" {{\n{code}\n}}\n')
    found = load_library(source, {"f": []})
    if said:
        assert isinstance(found, str)
        assert said in found
        assert "\n" not in found
        assert "no-file" in found or "cannot compile" not in found
    else:
        assert not isinstance(found, str), found
