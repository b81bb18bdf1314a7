"""Which parameters the optimizers update, and how, against plain formulas."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.optim import muon
from kiem.optim.optimizer import BETAS, BETAS_BESIDE_MUON, make_optimizers

LEARNING_RATE, DECAY, NUM_STEPS = 0.01, 0.1, 3


def make_model() -> Gemma3:
    model = Gemma3(preset("gemma3-micro", 300))
    initialize(model, 0)
    return model


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps (https://kellerjordan.github.io/posts/muon), in fp32."""
    x = matrix / matrix.norm()
    if x.shape[0] > x.shape[1]:
        return orthogonalized(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("adamw", torch.float32), ("muon", torch.float32), ("muon", torch.bfloat16)],
)
def test_every_parameter_is_updated_as_its_optimizer_says(
    kind: Literal["adamw", "muon"], dtype: torch.dtype
) -> None:
    model = make_model()
    optimizers = make_optimizers(model, kind, DECAY, matrix_dtype=dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    beta1, beta2 = BETAS if kind == "adamw" else BETAS_BESIDE_MUON
    generator = torch.Generator().manual_seed(0)
    by_muon = set()
    for step in range(1, NUM_STEPS + 1):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            is_hidden = parameter.ndim == 2 and name != "model.embed_tokens.weight"
            first, second = moments[name]
            if kind == "muon" and is_hidden:
                by_muon.add(id(parameter))
                first.lerp_(gradient, 0.05)
                update = orthogonalized(gradient.lerp(first, 0.95))
                # arXiv:2510.05491, algorithm 1, but the size stays that of Muon's update.
                rows = second[:, :1].lerp_(update.square().mean(1, keepdim=True), 0.05)
                divided = update / rows.sqrt()
                update = divided * (update.norm() / divided.norm())
                update *= 0.2 * math.sqrt(max(parameter.shape))  # arXiv:2502.16982, equation 4
            else:
                first.lerp_(gradient, 1 - beta1)
                second.lerp_(gradient.square(), 1 - beta2)
                corrected = (second / (1 - beta2**step)).sqrt() + 1e-8
                update = first / (1 - beta1**step) / corrected
            if is_hidden:
                expected[name] *= 1 - LEARNING_RATE * DECAY
            expected[name] -= LEARNING_RATE * update
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE
            optimizer.step()
    assert len(by_muon) == (7 * model.config.num_hidden_layers if kind == "muon" else 0)
    for name, parameter in model.named_parameters():
        difference = (parameter - expected[name]).norm() / (expected[name] - before[name]).norm()
        # Muon's updates are rounded in five steps: in bf16 by some per cent of their size.
        by_muon_bound = 0.03 if dtype == torch.bfloat16 else 1e-4
        assert difference < (by_muon_bound if id(parameter) in by_muon else 1e-5), name


@pytest.mark.parametrize(
    ("shape", "num_matrices"),
    [
        *(((96, 96), 1), ((96, 128), 5), ((128, 96), 5), ((64, 384), 1), ((64, 384), 5)),
        *(((256, 512), 1), ((512, 256), 2), ((259, 518), 1), ((1, 8), 5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_as_close_to_exact_as_that_of_torch(
    shape: tuple[int, int], num_matrices: int, dtype: torch.dtype
) -> None:
    """Matrices whose singular values fall by powers of ten, one alone and several together."""
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (
        [torch.zeros(shape, requires_grad=True) for _ in range(num_matrices)] for _ in range(2)
    )
    exact = []
    for one, other in zip(mine, theirs, strict=True):
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        falling = torch.logspace(0, -3, min(shape))
        one.grad = other.grad = (u * falling) @ v
        exact.append(-0.2 * math.sqrt(max(shape)) * orthogonalized(one.grad.double()))
    muon.Muon(mine, lr=1.0, row_beta2=0, dtype=dtype).step()
    torch.optim.Muon(theirs, lr=1.0, adjust_lr_fn="match_rms_adamw").step()
    for one, other, true in zip(mine, theirs, exact, strict=True):
        theirs_off, mine_off = ((p - true).norm() / true.norm() for p in (other, one))
        # torch multiplies in bf16.
        assert mine_off < (1e-3 if dtype == torch.float32 else max(0.06, 1.5 * theirs_off))


def test_muon_without_division_goes_on_with_the_state_of_torch() -> None:
    parameters = [torch.zeros(4, 6, requires_grad=True) for _ in range(2)]
    optimizers = [muon.Muon(parameters[:1], row_beta2=0), torch.optim.Muon(parameters[1:])]
    for _ in range(2):
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    mine, theirs = (o.state[p] for o, p in zip(optimizers, parameters, strict=True))
    assert mine.keys() == theirs.keys() == {"momentum_buffer"}
    assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (16, 16)])
def test_muon_moves_all_rows_alike(shape: tuple[int, int]) -> None:
    """Once it knows their usual sizes; rows without a gradient stay, and nothing becomes NaN."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(shape, requires_grad=True)
    optimizer = muon.Muon([weight], lr=1.0, weight_decay=0.0)
    scales = torch.logspace(0, -3, shape[0])[:, None]
    scales[3] = 0
    squares = torch.zeros(shape[0])
    for step in range(200):
        before = weight.detach().clone()
        weight.grad = scales * torch.randn(shape, generator=generator)
        optimizer.step()
        if step >= 100:
            squares += (weight.detach() - before).square().mean(1) / 100
    others = squares[torch.arange(len(squares)) != 3].sqrt()
    assert squares[3] == 0
    assert others.min() > 0.15 and others.max() < 0.25  # 0.2 are AdamW's
    weight.grad = torch.zeros(shape)
    muon.Muon([weight], lr=1.0, weight_decay=0.0).step()
    assert weight.isfinite().all()
