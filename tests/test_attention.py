"""Attention within documents: where they begin in a batch, and who sees whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import varlen_reference
from conftest import SMALL, WINDOW
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kiem.compute.attention import attend, causal_mask, repeat_kv, same_document
from kiem.compute.varlen import attend_documents
from kiem.model.config import preset
from kiem.model.context import Context, make_contexts
from kiem.model.gemma3 import DecoderLayer, Gemma3, Recompute, initialize, run_layer
from kiem.model.rotary import rotary_angles
from kiem.optim.batch import document_starts

BOS = 2
SCALE = 0.3


@pytest.fixture(autouse=True)
def reference() -> None:
    varlen_reference.register()
    varlen_reference.calls.clear()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (3, 5), (4, 300)])
def test_documents_are_those_between_bos(rows: int, length: int, share: float) -> None:
    """Also where a chunk goes on with a document of the one before, and where all are short."""
    generator = np.random.default_rng(rows)
    chunks = np.where(generator.random((rows, length)) < share, BOS, 7)
    starts = document_starts(chunks, BOS)
    assert starts.dtype == np.int32
    assert starts[0] == 0 and starts[-1] == chunks.size
    assert (np.diff(starts) > 0).all()
    document = (torch.from_numpy(chunks) == BOS).cumsum(1)
    found = same_document(torch.from_numpy(starts), rows, length)
    assert torch.equal(found, document[:, :, None] == document[:, None, :])


def starts_of(lengths: list[int], rows: int) -> Tensor:
    """Returns the starts of rows of documents with these lengths, each row from another one on."""
    chunks = np.full((rows, sum(lengths)), 7)
    for row in chunks:
        row[np.cumsum([0, *lengths[:-1]])] = BOS
        lengths = [*lengths[1:], lengths[0]]
    return torch.from_numpy(document_starts(chunks, BOS))


W = 6
PATTERNS = [
    [W - 1, W, W + 1, 2 * W],
    [1, 1, 2 * W, 1],
    [4 * W],  # a document as long as a chunk
    [1] * (2 * W),
    [2 * W + 1, W + 2, 3],
]


@pytest.mark.parametrize("window", [None, 1, W - 1, W, W + 1, 2 * W, 100])
@pytest.mark.parametrize("lengths", PATTERNS)
@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (2, 2)])
def test_attention_to_documents_equals_the_masked_one(
    lengths: list[int], window: int | None, heads: tuple[int, int]
) -> None:
    """In value and gradients, in fp64."""
    rows, num_tokens, head_dim = 2, sum(lengths), 8
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(rows, num_tokens, n, head_dim, generator=generator, dtype=torch.float64)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    starts, place = starts_of(lengths, rows), torch.arange(num_tokens)
    packed = (tensor.flatten(0, 1) for tensor in inputs)
    found = attend_documents(*packed, starts, num_tokens, window, SCALE).view_as(q)
    mask = causal_mask(place, place, window) & same_document(starts, rows, num_tokens)
    k_all, v_all = (repeat_kv(tensor.transpose(1, 2), heads[0]) for tensor in (k, v))
    expected = attend(q.transpose(1, 2), k_all, v_all, mask[:, None], window, SCALE)
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
    )
    assert varlen_reference.calls == {"forward": 1, "backward": 1}


def contexts(starts: Tensor, rows: int, num_tokens: int) -> list[tuple[Context, Context]]:
    """Returns masked contexts, full and sliding, and those of the same documents without a mask."""
    x = torch.zeros(rows, num_tokens, SMALL.hidden_size)
    masked = make_contexts(SMALL, x, starts, None)
    return [(c, Context(c.rotary, c.window, document_starts=starts)) for c in masked]


def layers() -> list[DecoderLayer]:
    model = Gemma3(SMALL)
    initialize(model, 1)
    return [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]


def passed(
    run: Any, layer: DecoderLayer, x: Tensor, context: Context, recompute: Recompute
) -> list[Tensor]:
    """Returns the output of a layer and its gradients."""
    x = x.clone().requires_grad_()
    out = run(layer, x, context, recompute=recompute)
    return [out, *torch.autograd.grad(out.square().mean(), [x, *layer.parameters()])]


@pytest.mark.parametrize(("recompute", "num_calls"), [("none", 1), ("selective", 1), ("full", 2)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_layers_attend_to_documents_as_with_a_mask(
    is_compiled: bool, recompute: Recompute, num_calls: int
) -> None:
    """Compiled once for each kind, whatever the number of documents; "selective" keeps the result
    of the kernel."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = run_layer
    if is_compiled:
        run = torch.compile(run_layer, dynamic=False, fullgraph=True, backend="aot_eager")
    rows, generator = 2, torch.Generator().manual_seed(0)
    for lengths in ([5, WINDOW, 11], [24], [1] * 24, [1, 1, 22]):
        starts = starts_of(lengths, rows)
        torch._dynamo.maybe_mark_dynamic(starts, 0)  # as `make_contexts` does on a GPU
        x = torch.randn(rows, sum(lengths), SMALL.hidden_size, generator=generator)
        for masked, packed in contexts(starts, rows, sum(lengths)):
            for layer in layers()[:3]:
                expected = passed(run_layer, layer, x, masked, "none")
                varlen_reference.calls.clear()
                found = passed(run, layer, x, packed, recompute)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                assert varlen_reference.calls == {"forward": num_calls, "backward": 1}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * is_compiled


class Recorder(TorchDispatchMode):
    """Keeps the arguments of all calls, by operation, and where results are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Any]] = {}
        self.devices: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls.setdefault(str(function), []).append(args)
        out = function(*args, **(kwargs or {}))
        self.devices |= {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def test_the_kernel_gets_tokens_as_they_are() -> None:
    """On tensors without data: bf16 [N, H, C], one head of keys, and no mask."""
    config = preset("gemma3-1b", 1000)
    batch_size, num_tokens = 2, 1024
    with torch.device("meta"):
        layer = DecoderLayer(config).to(torch.bfloat16)
        rotary = rotary_angles(torch.arange(num_tokens)[None], config.head_dim, 1e4)
        starts = torch.empty(17, dtype=torch.int32)
        x = torch.empty(batch_size, num_tokens, config.hidden_size, dtype=torch.bfloat16)
    for window, expected in ((512, [511, 0]), (None, [-1, 0]), (1024, [-1, 0])):
        with Recorder() as recorder:
            out = layer.compute(x, Context(rotary, window, document_starts=starts))
            out.sum().backward()
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        ((q, k, v, *rest),) = recorder.calls["torch_attn._varlen_attn.default"]
        for tensor, num_heads in ((q, 4), (k, 1), (v, 1)):
            assert tensor.shape == (batch_size * num_tokens, num_heads, 256)
            assert tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
        assert rest[2:7] == [num_tokens, num_tokens, expected[0] < 0, 256**-0.5, expected]
        assert not any("scaled_dot_product" in name for name in recorder.calls)


@pytest.mark.parametrize("has_documents", [False, True])
def test_a_pass_makes_no_tensor_on_the_host(has_documents: bool) -> None:
    """On a GPU each would be sent there, and waited for."""
    with torch.device("meta"):
        model = Gemma3(SMALL)
        ids = torch.empty(2, 3 * WINDOW, dtype=torch.int64)
        starts = torch.empty(17, dtype=torch.int32) if has_documents else None
    with Recorder() as recorder:
        model.hidden_states(ids, document_starts=starts).sum().backward()
    assert recorder.devices == {"meta"}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns how far they are apart; queries that see one key have no gradient."""
    found, expected = found.detach().float(), expected.detach()
    return float((found - expected).norm() / (1 + expected.norm()))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, W - 1, W, W + 1, 100])
@pytest.mark.parametrize("lengths", [*PATTERNS, [300, 511, 1, 513, 723]])
def test_the_kernel_of_a_gpu_equals_the_masked_attention(
    lengths: list[int], window: int | None
) -> None:
    """In bf16, with gemma3-1b's heads, against fp32: value and gradients."""
    rows, num_tokens, device = 2, sum(lengths), torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, gradient = (
        torch.randn(rows, num_tokens, n, 256, generator=generator, device=device).bfloat16()
        for n in (4, 1, 1, 4)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    starts, place = starts_of(lengths, rows).to(device), torch.arange(num_tokens, device=device)
    packed = (tensor.flatten(0, 1) for tensor in inputs)
    found = attend_documents(*packed, starts, num_tokens, window, 1 / 16).view_as(q)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    mask = causal_mask(place, place, window) & same_document(starts, rows, num_tokens)
    q, k, v = (tensor.transpose(1, 2) for tensor in exact)
    expected = attend(q, repeat_kv(k, 4), repeat_kv(v, 4), mask[:, None], window, 1 / 16)
    expected = expected.transpose(1, 2)
    assert relative_error(found, expected) < 0.02
    for one, other in zip(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, exact, gradient.float()),
        strict=True,
    ):
        assert relative_error(one, other) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_on_a_gpu_has_the_gradients_of_fp32(
    recompute: Recompute, has_documents: bool
) -> None:
    """Plain and compiled; other documents compile nothing again."""
    torch._dynamo.reset()
    model = Gemma3(preset("gemma3-nano", 2048))
    initialize(model, 1)
    model.cuda()

    def gradients(seed: int, *, is_bf16: bool) -> list[Tensor]:
        ids = torch.randint(3, 2048, (2, 600), generator=torch.Generator().manual_seed(seed))
        ids[seed, [7, 263, 264, 599][: 4 - seed]] = BOS
        starts = torch.from_numpy(document_starts(ids.numpy(), BOS)).cuda()
        ids = ids.cuda()
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=is_bf16):
            loss, _ = model(ids, ids.roll(-1, 1), starts if has_documents else None, 0.0, 1e-3)
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = [gradients(seed, is_bf16=False) for seed in (0, 1)]
    model.recompute = recompute
    found = [gradients(0, is_bf16=True)]
    model.compile_layers()
    found.append(gradients(0, is_bf16=True))
    torch._dynamo.utils.counters.clear()
    found.append(gradients(1, is_bf16=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    for pass_, exact in zip(found, (expected[0], expected[0], expected[1]), strict=True):
        for one, other in zip(pass_, exact, strict=True):
            assert relative_error(one, other) < 0.05


@pytest.mark.gpu
def test_masks_on_a_gpu_do_not_go_to_cudnn() -> None:
    q = torch.randn(1, 4, 64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda").tril()
    with Recorder() as recorder:
        attend(q, q, q, mask, 32, 1 / 16).sum().backward()
    assert not any("cudnn" in name for name in recorder.calls)
    assert any("attention" in name for name in recorder.calls)
