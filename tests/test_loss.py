"""The loss by blocks against the plain one, as a CPU computes it and as a GPU does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.library import Library

import kiem.model.loss
from kiem.compute import cross_entropy
from kiem.compute.cross_entropy import logits_gradient
from kiem.model.loss import IGNORE, summed_cross_entropy, token_cross_entropy

pytestmark = [  # what torch says to some GPUs
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]
# Beyond the largest relative error of bf16, whose numbers have 8 bits.
BF16_EPS = 2**-8


def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


def mm_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert out.dtype == out_dtype
    return out.copy_(mm(a, b, out_dtype))


def addmm_out(
    total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor, **_: Any
) -> Tensor:
    assert out.dtype == out_dtype
    return out.copy_(total + mm(a, b, out_dtype))


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets tensors on the CPU be computed with as on a GPU, whose products torch lacks here."""
    monkeypatch.setattr(kiem.model.loss, "device_type", lambda _: "cuda")
    library = Library("aten", "IMPL")
    library.impl("mm.dtype", mm, "CPU")
    library.impl("mm.dtype_out", mm_out, "CPU")
    library.impl("addmm.dtype_out", addmm_out, "CPU")
    yield
    library._destroy()


@pytest.fixture(params=["cpu", "cuda"])
def way(request: pytest.FixtureRequest) -> str:
    """As which device computes."""
    if request.param == "cuda":
        request.getfixturevalue("as_gpu")
    return str(request.param)


class Problem(NamedTuple):
    hidden: Tensor  # N D
    weight: Tensor  # V D
    targets: Tensor  # N

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        return self.hidden.grad, self.weight.grad


def problem(
    rows: int, entries: int, size: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Problem:
    """Returns random states and weights, with logits of size 1, and targets; most count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, dtype=dtype, generator=generator)
    weight = torch.randn(entries, size, dtype=dtype, generator=generator) / size**0.5
    targets = torch.randint(0, entries, (rows,), generator=generator)
    targets[::7] = IGNORE
    hidden, weight, targets = (tensor.to(device) for tensor in (hidden, weight, targets))
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), targets)


def plain_loss(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    log_z = logits.logsumexp(1)[targets != IGNORE]
    return nats + z_loss * log_z.square().sum(), nats.detach()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("rows", "entries"), [(1100, 301), (1100, 9000), (6, 262_144)])
def test_blockwise_loss_equals_the_plain_one(
    rows: int,
    entries: int,
    z_loss: float,
    in_place: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More rows than a block has, more entries than a slice has, and Gemma's vocabulary."""
    monkeypatch.setattr(cross_entropy, "GPU_BLOCK_BYTES", 500 * 9000 * 16)
    hidden, weight, targets = given = problem(rows, entries, 24, torch.float64)
    if in_place:  # beside what an earlier pass has left
        so_far = torch.ones_like(weight)
        loss, nats = summed_cross_entropy(hidden, weight, targets, z_loss, 0.5, so_far)
        loss.backward()
        assert weight.grad is None
        found = hidden.grad, so_far - 1
    else:
        loss, nats = summed_cross_entropy(hidden, weight, targets, z_loss)
        (loss * 0.5).backward()
        found = given.gradients()
    hidden.grad = weight.grad = None

    expected, expected_nats = plain_loss(hidden @ weight.T, targets, z_loss)
    (0.5 * expected).backward()
    torch.testing.assert_close(nats, expected_nats)
    torch.testing.assert_close(found, given.gradients())


def test_blockwise_loss_under_autocast_sums_in_fp32(way: str) -> None:
    """Products of bf16 factors, everything after them in fp32."""
    hidden, weight, targets = given = problem(1100, 9000, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss, nats = summed_cross_entropy(hidden, weight, targets, 1e-3)
    loss.backward()
    found = given.gradients()
    hidden.grad = weight.grad = None

    factors = hidden.bfloat16(), weight.bfloat16().T
    # A CPU rounds the logits to bf16.
    logits = (factors[0] @ factors[1]).float() if way == "cpu" else mm(*factors, torch.float32)
    expected, expected_nats = plain_loss(logits, targets, 1e-3)
    expected.backward()
    torch.testing.assert_close(nats, expected_nats, rtol=1e-5, atol=0)
    for gradient, wanted in zip(found, given.gradients(), strict=True):
        assert gradient is not None and wanted is not None and gradient.dtype == torch.float32
        # Some steps of bf16 at the size of the largest.
        atol = 4 * BF16_EPS * float(wanted.abs().max())
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=atol)


@pytest.mark.usefixtures("way")
def test_loss_of_each_token_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several blocks of rows, and with tokens that do not count."""
    monkeypatch.setattr(cross_entropy, "GPU_BLOCK_BYTES", 400 * 2000 * 8)
    hidden, weight, targets = problem(1500, 2000, 16)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    found = token_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(found, expected)
    assert found[::7].eq(0).all()


@pytest.mark.usefixtures("as_gpu")
def test_blocks_of_all_updates_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile runs once: for whole blocks, a last one with fewer rows, and any scale."""
    monkeypatch.setattr(cross_entropy, "GPU_BLOCK_BYTES", 256 * 500 * 6)
    counter = CompileCounter()  # type: ignore[no-untyped-call]
    compiled = torch.compile(logits_gradient, backend=counter, dynamic=False, fullgraph=True)
    hidden, weight, targets = given = problem(700, 500, 16)
    gradients = []
    for function in (compiled, logits_gradient):
        for scale in (torch.tensor(1 / 599), torch.tensor(1 / 600), 0.25):
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = summed_cross_entropy(
                    hidden, weight, targets, 1e-4, scale, logits_gradient=function
                )
            loss.backward()
        gradients.append(given.gradients())
        hidden.grad = weight.grad = None
    torch.testing.assert_close(gradients[0], gradients[1])
    assert counter.frame_count == 1


class OnGpu(NamedTuple):
    """What the tests on a GPU vary."""

    bf16: bool
    compiled: bool
    rows: int  # of which a block has 2048 under bf16 and 1536 in fp32


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [OnGpu(True, True, 4100), OnGpu(True, False, 4100), OnGpu(False, False, 700)],
    ids=["compiled", "eager", "fp32"],
)
def test_loss_on_a_gpu_equals_that_in_fp32(case: OnGpu) -> None:
    """Gemma's vocabulary; the gradient is added to another, and nothing waits for the GPU."""
    hidden, weight, targets = given = problem(case.rows, 262_144, 256, device="cuda")
    scale = torch.tensor(1 / case.rows, device="cuda")
    so_far = torch.full_like(weight, 1e-4)
    function: Callable[..., Any] = logits_gradient
    if case.compiled:
        torch.compiler.reset()  # a function can be compiled for so many shapes only
        function = torch.compile(logits_gradient, dynamic=False, fullgraph=True)

    def compute() -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=case.bf16):
            return summed_cross_entropy(hidden, weight, targets, 1e-4, scale, so_far, function)

    compute()  # makes the kernels
    so_far.fill_(1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, nats = compute()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss.backward()
    found = hidden.grad, so_far - 1e-4

    # In fp32 with the same factors, a few rows at a time.
    factors = torch.bfloat16 if case.bf16 else torch.float32
    x, w = (tensor.detach().to(factors).float().requires_grad_() for tensor in given[:2])
    expected_nats = torch.zeros((), device="cuda", dtype=torch.float64)
    for start in range(0, case.rows, 512):
        part = slice(start, start + 512)
        expected, part_nats = plain_loss(x[part] @ w.T, targets[part], 1e-4)
        (expected * scale).backward()
        expected_nats += part_nats
    torch.testing.assert_close(nats.double(), expected_nats, rtol=1e-5, atol=0)
    for gradient, wanted in zip(found, (x.grad, w.grad), strict=True):
        assert gradient is not None and wanted is not None
        rtol = BF16_EPS if case.bf16 else 1e-4
        assert (gradient - wanted).norm() < rtol * wanted.norm()


@pytest.mark.gpu
def test_loss_on_a_gpu_takes_a_block_and_one_copy_of_the_weights() -> None:
    hidden, weight, targets = problem(6144, 262_144, 1152, device="cuda")
    so_far = torch.zeros_like(weight)
    torch.compiler.reset()
    function = torch.compile(logits_gradient, dynamic=False, fullgraph=True)
    scale = torch.tensor(1.0, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            summed_cross_entropy(hidden, weight, targets, 1e-5, scale, so_far, function)
    taken = torch.cuda.max_memory_allocated() - held
    expected = cross_entropy.GPU_BLOCK_BYTES + 2 * weight.numel()
    # Beside them the gradient of the hidden states and their copy in bf16.
    assert expected < taken < expected + 8 * hidden.numel() + (64 << 20)


@pytest.mark.gpu
def test_loss_of_each_token_on_a_gpu() -> None:
    hidden, weight, targets = problem(2000, 262_144, 256, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = token_cross_entropy(hidden, weight, targets)
    logits = hidden.bfloat16().float() @ weight.bfloat16().float().T
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[::7].eq(0).all()
