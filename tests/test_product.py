"""Products of fp32 on matrix units: as exact as fp32, whatever lies how in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kiem.model.product import Linear, multiply, multiply_into, split_products

needs_units = pytest.mark.skipif(split_products() is None, reason="no matrix units here")
# Of the sum of |a| |b|: what fp32 rounds away in a sum; torch's own products come to 0.9 of it.
BOUND = 2.0**-20
SHAPES = [(256, 512, 256), (300, 1801, 257), (259, 577, 1031), (2049, 65, 257), (263, 9001, 300)]


def factor(rows: int, columns: int, transposed: bool, seed: int) -> Tensor:
    """Numbers of very different size, positive and negative."""
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if transposed else (rows, columns)
    values = torch.randn(shape, generator=generator)
    values *= torch.exp(6 * torch.randn(shape, generator=generator))
    return values.T if transposed else values


def layouts() -> Iterator[tuple[bool, bool]]:
    yield from ((a, b) for a in (False, True) for b in (False, True))


def test_the_units_are_used_where_there_are_some() -> None:
    has_units = torch.cpu.get_capabilities().get("amx_bf16", False)
    assert isinstance(split_products(), ctypes.CDLL) == has_units, split_products()


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_as_exact_as_fp32(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    for number, (a_transposed, b_transposed) in enumerate(layouts()):
        a = factor(m, k, a_transposed, 2 * number)
        b = factor(k, n, b_transposed, 2 * number + 1)
        expected = a.double() @ b.double()
        bound = BOUND * (a.double().abs() @ b.double().abs())
        assert ((multiply(a, b) - expected).abs() <= bound).all()

        frame = torch.randn(m + 2, n + 5)
        before = frame.clone()
        multiply_into(frame[1:-1, 2:-3], a, b, add=True)
        added = before[1:-1, 2:-3].double() + expected
        assert ((frame[1:-1, 2:-3] - added).abs() <= bound + BOUND * added.abs()).all()
        frame[1:-1, 2:-3] = before[1:-1, 2:-3]
        assert torch.equal(frame, before)  # nothing beside it


def test_ordinary_products_are_closer_to_the_truth_than_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1024, 1152, generator=generator)
    b = torch.randn(1152, 2048, generator=generator)
    expected = a.double() @ b.double()
    error, of_torch = ((x - expected).square().mean() for x in (multiply(a, b), a @ b))
    assert error <= of_torch


@needs_units
def test_a_row_is_the_same_alone_and_in_company() -> None:
    a, b = factor(700, 1500, False, 0), factor(1500, 600, True, 1)
    whole = multiply(a, b)
    assert torch.equal(multiply(a[:300], b), whole[:300])
    assert torch.equal(multiply(a[300:], b), whole[300:])
    num_threads = torch.get_num_threads()
    try:
        for num in (1, 3):
            torch.set_num_threads(num)
            assert torch.equal(multiply(a, b), whole)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("bits", [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1])
def test_what_is_not_finite_stays_so(bits: int) -> None:
    a, b = torch.ones(256, 512), torch.ones(512, 300)
    a[7, 100] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    finite = multiply(a, b).isfinite()
    assert not finite[7].any()
    assert finite.sum() == 255 * 300


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # in torch's compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_layer(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(256, 640)
    x = torch.randn(2, 300, 256, generator=generator, requires_grad=True)
    of_y = torch.randn(2, 300, 640, generator=generator)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, layer.weight)]
    F.linear(*exact).backward(of_y.double())
    run = torch.compile(layer, dynamic=False) if compiled else layer
    run(x).backward(of_y)
    assert layer.weight.grad is not None and layer.weight.grad.is_contiguous()
    for tensor, expected in zip((x, layer.weight), exact, strict=True):
        torch.testing.assert_close(tensor.grad, expected.grad.float(), rtol=1e-5, atol=5e-5)


def test_gradients_of_a_sum_whose_strides_are_zero() -> None:
    layer = Linear(256, 640)
    x = torch.randn(512, 256, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.weight.detach().double().sum(0).expand(512, -1)
    torch.testing.assert_close(x.grad, expected.float(), rtol=1e-5, atol=1e-4)


def test_tensors_without_data_are_not_multiplied() -> None:
    with FakeTensorMode():
        a, b, out = torch.empty(1024, 300), torch.empty(300, 1024), torch.empty(1024, 1024)
        multiply_into(out, a, b)
        assert multiply(a, b).shape == (1024, 1024)
