"""Whether a GPU computes what it should, and what that costs: products, attention, loss, model.

Run by gpu.py. Errors are norms of differences, divided by the norm of what is expected.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import platform
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_record import (
    BOS,
    PAD,
    Bench,
    compile_refusal,
    first_line,
    made_up_chunks,
    new_model,
    new_peer,
    peak_bytes,
    relative_error,
    run_part,
    seconds_of,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kiem.compute.attention import attend, causal_mask, same_document
from kiem.compute.memory import is_out_of_memory
from kiem.model.gemma3 import Gemma3
from kiem.model.loss import IGNORE, summed_cross_entropy
from kiem.optim.batch import Collator

_COPIED_BYTES = 1 << 32
_PRODUCT_SIZE = 8192
_MOST_BF16_ERROR = 1e-2
_BACKENDS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_Z_LOSS = 1e-4
_MUCH_MEMORY_BYTES = 60e9  # with less, gradients to compare go into main memory


def versions(bench: Bench) -> None:
    """What is installed, whether torch.compile works, and the ceilings of the card."""
    names = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "msgspec", "pyarrow")
    found = {name: version_of(name) for name in names}
    found["python"] = platform.python_version()
    found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    found["c_compiler"] = shutil.which("gcc") or shutil.which("clang") or "none"
    words = [f"{name} {version}" for name, version in found.items()]
    bench.report("versions", ", ".join(words), **found)
    refusal = compile_refusal(bench.device)
    bench.report(
        "torch.compile", refusal or "works", verdict="eager only" if refusal is not None else "ok"
    )
    size = _PRODUCT_SIZE if not bench.rehearse else 64
    a, b = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    flops = 2 * size**3 / seconds_of(lambda: a @ b, bench.device)
    peak = bench.gpu.matrix_flops if bench.gpu else None
    bench.report("matrix product", flops / 1e12, "TFLOP/s", published=peak)
    num_values = (_COPIED_BYTES if not bench.rehearse else 1 << 16) // 4
    source = torch.randn(num_values, device=bench.device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), bench.device)
    bench.report("copy, bytes read and written", 8 * num_values / seconds / 1e9, "GB/s")
    if bench.device.type == "cuda":
        num_bytes = torch.cuda.get_device_properties(bench.device).total_memory
        bench.report("memory", num_bytes / 1e9, "GB")


def version_of(package: str) -> str:
    """Returns the version of an installed package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def attention(bench: Bench) -> None:
    """kiem's attention and torch's masked kernels, on documents in windows, against fp32."""
    config, batch_size, length = bench.sizes.config, bench.sizes.batch_size, bench.sizes.chunk_size
    chunks = made_up_chunks(bench.sizes, batch_size)
    starts = Collator(BOS, PAD, True, bench.device)(chunks).document_starts
    scale = config.query_pre_attn_scalar**-0.5
    torch.manual_seed(0)
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    shapes = [(batch_size, number, length, config.head_dim) for number in heads]  # B heads T C
    inputs = [torch.randn(shape, device=bench.device) for shape in shapes]
    output_gradient = torch.randn_like(inputs[0])
    for kind, window in (("sliding", config.sliding_window), ("full", None)):
        positions = torch.arange(length, device=bench.device)[None]
        mask = causal_mask(positions, positions, window)
        mask = (mask & same_document(starts, batch_size, length))[:, None]  # B 1 T T

        def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            k, v = (x.expand_as(q) for x in (k, v))  # all presets have one head of keys
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        def by_documents(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask, window: int | None = window
        ) -> Tensor:
            if bench.device.type == "cpu":  # where kiem has masks
                k, v = (x.expand_as(q) for x in (k, v))
                return attend(q, k, v, mask, window, scale)
            from kiem.compute.varlen import attend_documents

            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # N heads C
            y = attend_documents(q, k, v, starts, length, window, scale)
            return y.unflatten(0, (batch_size, length)).transpose(1, 2)

        with sdpa_kernel(SDPBackend.MATH):
            expected = forward_and_back(masked, inputs, output_gradient)
        low = [x.bfloat16() for x in inputs]
        ours = compare(
            bench, f"kiem, {kind}", by_documents, low, output_gradient, expected, is_ours=True
        )
        for name, backend in _BACKENDS.items():
            if bench.rehearse and name != "math":
                continue  # CPUs have no others
            try:
                with sdpa_kernel(backend):
                    args = masked, low, output_gradient, expected
                    theirs = compare(bench, f"{name}, {kind}", *args)
            except RuntimeError as error:
                bench.report(f"{name}, {kind}", first_line(error), verdict="left out")
                continue
            if name == "efficient":
                ratio = theirs / ours
                bench.report(f"kiem beside {name}, {kind}", ratio, "x", at_least=1, is_speed=True)


def forward_and_back(
    run: Callable[..., Tensor], inputs: list[Tensor], output_gradient: Tensor
) -> list[Tensor]:
    """Returns the output, and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = run(*leaves)
    output.backward(output_gradient.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def compare(
    bench: Bench,
    name: str,
    run: Callable[..., Tensor],
    inputs: list[Tensor],
    output_gradient: Tensor,
    expected: list[Tensor],
    is_ours: bool = False,
) -> float:
    """Reports the largest error of output and gradients; returns the seconds of both passes."""
    found = forward_and_back(run, inputs, output_gradient)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    seconds = seconds_of(lambda: forward_and_back(run, inputs, output_gradient), bench.device)
    details = {"errors": dict(zip(("output", "dq", "dk", "dv"), errors, strict=True))}
    worst = max(errors, key=lambda error: error if error == error else float("inf"))
    limit = _MOST_BF16_ERROR if is_ours else None
    bench.report(f"{name}, error", worst, at_most=limit, **details)
    bench.report(f"{name}, forward and back", 1000 * seconds, "ms")
    return seconds


def loss(bench: Bench) -> None:
    """The loss over the whole vocabulary: kiem's, and what others have for it."""
    sizes, device = bench.sizes, bench.device
    model = new_model(bench)
    if compile_refusal(device) is None:
        model.compile_layers()
    weight = model.model.embed_tokens.weight
    chunks = made_up_chunks(sizes, sizes.batch_size)
    targets = Collator(BOS, PAD, True, device)(chunks).targets.flatten()
    torch.manual_seed(0)
    hidden = torch.randn(len(targets), sizes.config.hidden_size, device=device)

    # Against fp32, whose logits of all tokens would not fit.
    few = slice(0, len(targets) // 8)
    expected = loss_and_gradients(plain_loss, hidden[few], weight, targets[few])
    weight.grad = None
    found = loss_and_gradients(our_loss(bench, model), hidden[few], weight, targets[few])
    names = ("loss", "gradient of the states", "gradient of the weights")
    for name, a, b, limit in zip(names, found, expected, (1e-4, 1e-2, 1e-2), strict=True):
        bench.report(f"{name}, error", relative_error(a, b), at_most=limit)
    del expected, found

    for name, function in {"kiem": our_loss(bench, model), **peer_losses(bench)}.items():
        weight.grad = None

        def run(function: Callable[..., Tensor] = function) -> None:
            loss_and_gradients(function, hidden, weight, targets)

        try:
            run()
            num_bytes = peak_bytes(device, run)
            seconds = seconds_of(run, device, repeats=5)
        except Exception as error:
            if name == "kiem":
                raise
            fits = not is_out_of_memory(error)
            why = f"{type(error).__name__}: {first_line(error)}" if fits else "no memory"
            bench.report(f"{name}, {len(targets)} tokens", why, verdict="left out")
            continue
        what = f"{name}, {len(targets)} tokens"
        bench.report(what, 1000 * seconds, "ms", memory_bytes=num_bytes)
        bench.report(f"{what}, memory", num_bytes / 1e9, "GB")


def loss_and_gradients(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor
) -> list[Tensor]:
    """Returns the summed loss, and its gradients with respect to states and weights."""
    hidden = hidden.detach().requires_grad_()
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.zero_()
    value = function(hidden, weight, targets)
    value.backward()
    return [value.detach(), hidden.grad, weight.grad]


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss with z-loss, as one would write it, in fp32."""
    logits = F.linear(hidden, weight)
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    log_z = logits.logsumexp(-1)[targets != IGNORE]
    return nats + _Z_LOSS * log_z.square().sum()


def our_loss(bench: Bench, model: Gemma3) -> Callable[..., Tensor]:
    """Returns kiem's loss, as training calls it."""

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with bench.distributed.autocast():
            detached = weight.detach()
            return summed_cross_entropy(
                hidden, detached, targets, _Z_LOSS, 1.0, weight.grad, model.logits_gradient
            )[0]

    return function


def peer_losses(bench: Bench) -> dict[str, Callable[..., Tensor]]:
    """Returns losses of others in bf16, without z-loss, which not all of them have."""

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16):
            logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    found: dict[str, Callable[..., Tensor]] = {"F.cross_entropy": cross_entropy}
    if hasattr(F, "linear_cross_entropy"):

        def linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            low = hidden.bfloat16(), weight.bfloat16()
            return F.linear_cross_entropy(*low, targets, ignore_index=IGNORE, reduction="sum")

        found["F.linear_cross_entropy"] = linear
    if importlib.util.find_spec("liger_kernel") and bench.device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum")

        def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return liger(weight.bfloat16(), hidden.bfloat16(), targets)

        found["Liger"] = fused
    return found


def parity(bench: Bench) -> None:
    """The model against transformers' with the same weights: logits, loss, gradients."""
    sizes, device = bench.sizes, bench.device
    model = new_model(bench)
    with torch.no_grad():  # norms that do something
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.1)
    peer = new_peer(bench, model)
    chunks = made_up_chunks(sizes, 1)
    chunks[chunks == BOS] = BOS + 1
    batch = Collator(BOS, PAD, False, device)(chunks)
    num_targets = int(batch.num_targets)

    def ours() -> tuple[Tensor, Tensor]:
        loss, _ = model(batch.ids, batch.targets, None, 0.0, 1 / num_targets)
        with torch.no_grad():
            return loss, model.logits(model.hidden_states(batch.ids))

    def theirs() -> tuple[Tensor, Tensor]:
        output = peer(batch.ids, labels=batch.ids)
        return output.loss, output.logits

    expected = logits_and_gradients(peer, theirs)
    report_parity(bench, "fp32", logits_and_gradients(model, ours), expected, (1e-5, 1e-4))
    with torch.autocast(device.type, torch.bfloat16):
        limit = errors(logits_and_gradients(peer, theirs), expected)
        found = logits_and_gradients(model, ours)
    report_parity(bench, "bf16", found, expected, tuple(1.2 * error for error in limit))
    del found, expected
    for parameter in (*model.parameters(), *peer.parameters()):
        parameter.grad = None
    compare_documents(bench, model, peer)


# The logits, and the gradients by name.
Outcome = tuple[Tensor, dict[str, Tensor]]


def logits_and_gradients(model: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> Outcome:
    """Returns what a model computes, with loss and logits from `run`."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss, logits = run()
    loss.backward()
    device = logits.device
    if device.type == "cuda":
        num_bytes = torch.cuda.get_device_properties(device).total_memory
        device = device if num_bytes > _MUCH_MEMORY_BYTES else torch.device("cpu")
    gradients = {name: p.grad.to(device) for name, p in model.named_parameters()}
    return logits.detach().float(), gradients


def errors(found: Outcome, expected: Outcome) -> tuple[float, float]:
    """Returns the errors of the logits and of the whole gradient."""
    of, whole = 0.0, 0.0
    for name, gradient in expected[1].items():
        of += float((found[1][name] - gradient).norm() ** 2)
        whole += float(gradient.norm() ** 2)
    return relative_error(found[0], expected[0]), (of / whole) ** 0.5


def report_parity(
    bench: Bench, precision: str, found: Outcome, expected: Outcome, limits: tuple[float, ...]
) -> None:
    for name, error, limit in zip(
        ("logits", "gradients"), errors(found, expected), limits, strict=True
    ):
        bench.report(f"{precision}, {name}", error, at_most=limit)


def compare_documents(bench: Bench, model: Gemma3, peer: nn.Module) -> None:
    """Several documents in a chunk against transformers on each alone."""
    length = bench.sizes.chunk_size
    chunks = made_up_chunks(bench.sizes, 1)
    chunks[chunks == BOS] = BOS + 1
    borders = [0, length // 8, length // 4, length]
    chunks[0, borders[:-1]] = BOS
    batch = Collator(BOS, PAD, True, bench.device)(chunks)
    parts = [slice(*pair) for pair in itertools.pairwise(borders)]

    def theirs() -> Tensor:
        return torch.cat([peer(batch.ids[:, part]).logits for part in parts], 1)

    def ours() -> Tensor:
        return model.logits(model.hidden_states(batch.ids, document_starts=batch.document_starts))

    with torch.no_grad():
        expected = theirs()
        # Angles of other positions are rounded in other ways.
        bench.report("fp32, documents", relative_error(ours(), expected), at_most=1e-4)
        with torch.autocast(bench.device.type, torch.bfloat16):
            limit = 1.2 * relative_error(theirs(), expected)
            bench.report("bf16, documents", relative_error(ours(), expected), at_most=limit)


if __name__ == "__main__":
    run_part(versions, attention, loss, parity)
