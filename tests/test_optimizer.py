"""Which parameters the optimizers update, and how, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from kiem.errors import ExitCode, UserError
from kiem.model.gemma3 import Gemma3
from kiem.model.initialize import initialize
from kiem.model.presets import preset
from kiem.training.optimizer import BETAS, make_optimizers

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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_updated_as_its_optimizer_says(kind: str) -> None:
    model = make_model()
    optimizers = make_optimizers(model, kind, DECAY)  # type: ignore[arg-type]
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
        # torch orthogonalizes in bf16, so Muon's updates differ by some per cent of their size.
        assert difference < (0.03 if id(parameter) in by_muon else 1e-5), name


def test_without_muon_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="has no Muon") as caught:
        make_optimizers(make_model(), "muon", DECAY)
    assert caught.value.exit_code == ExitCode.BAD_OPTION
