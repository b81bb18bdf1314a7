"""Which parameters the optimizers update, and how, against plain formulas."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.optim import muon
from kiem.optim.optimizer import BETAS, make_optimizers

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
                update *= 0.2 * math.sqrt(max(parameter.shape))  # arXiv:2502.16982, equation 4
            else:
                first.lerp_(gradient, 1 - BETAS[0])
                second.lerp_(gradient.square(), 1 - BETAS[1])
                corrected = (second / (1 - BETAS[1] ** step)).sqrt() + 1e-8
                update = first / (1 - BETAS[0] ** step) / corrected
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
    muon.Muon(mine, lr=1.0, dtype=dtype).step()
    torch.optim.Muon(theirs, lr=1.0, adjust_lr_fn="match_rms_adamw").step()
    for one, other, true in zip(mine, theirs, exact, strict=True):
        theirs_off, mine_off = ((p - true).norm() / true.norm() for p in (other, one))
        # torch multiplies in bf16.
        assert mine_off < (1e-3 if dtype == torch.float32 else max(0.06, 1.5 * theirs_off))


def test_state_of_muon_is_that_of_torch() -> None:
    """So checkpoints of either go on with the other."""
    parameters = [torch.zeros(4, 6, requires_grad=True) for _ in range(2)]
    optimizers = [muon.Muon(parameters[:1]), torch.optim.Muon(parameters[1:])]
    for _ in range(2):
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    mine, theirs = (o.state[p] for o, p in zip(optimizers, parameters, strict=True))
    assert mine.keys() == theirs.keys() == {"momentum_buffer"}
    assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
