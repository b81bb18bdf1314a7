"""What benchmarks/recipe.py tries before kiem has it: one optimizer with many settings.

With all of them at their defaults it does what kiem's own optimizers do. Matrices of one shape and
kind are updated together. Shapes: S matrices, m rows and n columns; for the embedding, V rows and D
columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kiem.optim.muon import orthogonalize
from kiem.optim.optimizer import BETAS_BESIDE_MUON, is_hidden_matrix
from kiem.training.run import Run

# Polar Express (arXiv:2505.16932): each step's own best coefficients, for singular values from 1e-3
# to 1, with its safety factor.
_POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_POLAR_SAFETY = 1.02
_EPSILON = 1e-10


@dataclass(frozen=True)
class Settings:
    """What can be changed; see each one's source for what it does.

    Attributes:
        embedding_rate, norm_rate, matrix_rate: factors of the learning rate.
        beta1, beta2: of the embedding's moments.
        norm_beta2: of the norms' second moments.
        momentum: of Muon. It rises from `first_momentum` in the first fifth of the training, and
            changes to `last_momentum` in the last.
        hold: until this share of the training the rate stays at its highest, then it falls linearly
            to zero. Below 0: by the options.
        cautious: 1 decays only weights that an update makes smaller (arXiv:2510.12402).
        fading_decay: 1 lets the decay fall linearly to zero besides the rate (nanochat).
        look_ahead: how far gradients are taken ahead, along a moving average of the weights' steps
            with `look_ahead_beta`, between a tenth and four fifths of the training (EMA-Nesterov,
            arXiv:2605.25395).
        row_beta2: of the second moment of each row's update, by which it is divided (NorMuon,
            arXiv:2510.05491); 0: without that.
        row_long: 1 takes columns for rows in matrices that have more of them (nanochat).
        row_size: 1 lets that division alone decide the size of the update, as Adam's does; 0 scales
            it to what it was before.
        polar: 1 takes the coefficients of Polar Express (arXiv:2505.16932).
        soap: beta of the second moments in the eigenbasis of the smaller side, by which momentum is
            divided before it is orthogonalized (SOAP-Muon; SOAP: arXiv:2409.11321).
        soap_embedding: 1 does AdamW's division for the embedding in the eigenbasis of its columns.
        soap_beta, soap_every: beta of the covariances, and updates between new eigenbases.
        fixed_norm: size of an update as a share of the matrix, whose norm stays what it was, where
            the model's norms make it irrelevant (MuonH, modded-nanogpt#267).
    """

    embedding_rate: float = 1
    norm_rate: float = 1
    matrix_rate: float = 1
    beta1: float = BETAS_BESIDE_MUON[0]
    beta2: float = BETAS_BESIDE_MUON[1]
    norm_beta2: float = BETAS_BESIDE_MUON[1]
    momentum: float = 0.95
    first_momentum: float = 0
    last_momentum: float = 0
    hold: float = -1
    cautious: float = 0
    fading_decay: float = 0
    look_ahead: float = 0
    look_ahead_beta: float = 0.99
    row_beta2: float = 0.95
    row_long: float = 0
    row_size: float = 0
    polar: float = 0
    soap: float = 0
    soap_embedding: float = 0
    soap_beta: float = 0.95
    soap_every: float = 10
    fixed_norm: float = 0


class Trial(torch.optim.Optimizer):
    """Muon for the matrices within layers and AdamW for the rest, changed by settings."""

    def __init__(self, run: Run, settings: Settings):
        model = run.model.module
        super().__init__(list(model.parameters()), {"lr": run.spec.recipe.learning_rate})
        self._settings = settings
        self._highest_rate = run.spec.recipe.learning_rate
        self._max_steps = run.spec.recipe.max_steps or 1
        self._warmup = run.spec.options.warmup_ratio
        self._weight_decay = run.spec.options.weight_decay
        self._dtype = run.spec.distributed.matrix_dtype
        self._step, self._ahead = 0, 0.0
        self._stacks: dict[tuple[torch.Size, bool], list[nn.Parameter]] = {}
        self._others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if is_hidden_matrix(name, parameter):
                kind = (parameter.shape, "gate_proj" not in name)
                self._stacks.setdefault(kind, []).append(parameter)
            else:
                self._others.append(parameter)
        self._memory: dict[object, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates all parameters."""
        assert closure is None
        settings = self._settings
        progress = (self._step + 0.5) / self._max_steps
        share = self.param_groups[0]["lr"] / self._highest_rate
        if settings.hold >= 0 and progress >= self._warmup:
            share = min(1.0, (1 - progress) / (1 - max(settings.hold, self._warmup)))
        parameters: list[Tensor] = self.param_groups[0]["params"]
        if settings.look_ahead:
            averages = [self._state(("steps", p), steps=p)["steps"] for p in parameters]
            before = [p - self._ahead * a for p, a in zip(parameters, averages, strict=True)]
        for kind, stack in self._stacks.items():
            self._update_matrices(kind, stack, share, progress)
        for parameter in self._others:
            self._update_other(parameter, share)
        self._step += 1
        if settings.look_ahead:
            is_on = 0.1 <= (self._step + 0.5) / self._max_steps < 0.8
            self._ahead = settings.look_ahead * share if is_on else 0.0
            for p, average, old in zip(parameters, averages, before, strict=True):
                average.lerp_(p - old, 1 - settings.look_ahead_beta)
                p.add_(average, alpha=self._ahead)

    def _state(self, key: object, **like: Tensor) -> dict[str, Tensor]:
        """Returns the tensors of a key, at first zeros like these."""
        if key not in self._memory:
            self._memory[key] = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        return self._memory[key]

    def _momentum(self, progress: float) -> float:
        settings, highest = self._settings, self._settings.momentum
        if settings.first_momentum and progress < 0.2:
            return highest + (settings.first_momentum - highest) * (1 - progress / 0.2)
        if settings.last_momentum and progress > 0.8:
            return highest + (settings.last_momentum - highest) * (progress - 0.8) / 0.2
        return highest

    def _update_matrices(
        self,
        kind: tuple[torch.Size, bool],
        stack: list[nn.Parameter],
        share: float,
        progress: float,
    ) -> None:
        settings = self._settings
        gradients = torch.stack([p.grad for p in stack if p.grad is not None])  # S m n
        weights = torch.stack([p.data for p in stack])  # S m n
        across = 1 if settings.row_long and kind[0][0] < kind[0][1] else 2
        state = self._state(kind, average=gradients, rows=gradients.narrow(across, 0, 1))
        momentum = self._momentum(progress)
        state["average"].lerp_(gradients, 1 - momentum)
        update = gradients.lerp(state["average"], momentum)
        if settings.soap:
            update = self._divide_in_eigenbasis(kind, update, gradients)
        update = (polar if settings.polar else orthogonalize)(update.to(self._dtype)).float()
        if settings.row_beta2:
            size = update.norm(dim=(1, 2), keepdim=True)
            state["rows"].lerp_(update.square().mean(across, keepdim=True), 1 - settings.row_beta2)
            rows = state["rows"] / (1 - settings.row_beta2 ** (self._step + 1))
            update = update / (rows + _EPSILON).sqrt()
            if settings.row_size:
                update /= math.sqrt(max(kind[0]))
            else:
                update = update * (size / update.norm(dim=(1, 2), keepdim=True))
        rate = self._highest_rate * share * settings.matrix_rate
        is_scale_invariant = kind[1]
        if settings.fixed_norm and is_scale_invariant:
            size = weights.norm(dim=(1, 2), keepdim=True)
            step = settings.fixed_norm * share * size / update.norm(dim=(1, 2), keepdim=True)
            weights -= step * update
            weights *= size / weights.norm(dim=(1, 2), keepdim=True)
        else:
            decay = rate * self._weight_decay * (1 - progress if settings.fading_decay else 1)
            decayed = weights * (weights * update > 0) if settings.cautious else weights
            weights = weights - decay * decayed
            weights -= rate * 0.2 * math.sqrt(max(kind[0])) * update
        for parameter, weight in zip(stack, weights, strict=True):
            parameter.copy_(weight)

    def _divide_in_eigenbasis(self, kind: object, update: Tensor, gradients: Tensor) -> Tensor:
        settings = self._settings
        if update.shape[1] > update.shape[2]:
            return self._divide_in_eigenbasis(kind, update.mT, gradients.mT).mT
        gram = gradients @ gradients.mT  # S m m
        state = self._state(("soap", kind), covariance=gram, basis=gram, squares=gradients)
        self._refresh_basis(state, gram)
        basis = state["basis"]
        state["squares"].lerp_((basis.mT @ gradients).square(), 1 - settings.soap)
        return basis @ ((basis.mT @ update) / (state["squares"].sqrt() + _EPSILON))

    def _refresh_basis(self, state: dict[str, Tensor], gram: Tensor) -> None:
        """Follows the eigenvectors by a step of orthogonal iteration."""
        state["covariance"].lerp_(gram, 1 - self._settings.soap_beta)
        if self._step == 0:
            state["basis"] = torch.linalg.eigh(state["covariance"])[1].flip(-1)
        elif self._step % int(self._settings.soap_every) == 0:
            state["basis"] = torch.linalg.qr(state["covariance"] @ state["basis"])[0]

    def _update_other(self, parameter: nn.Parameter, share: float) -> None:
        settings, gradient = self._settings, parameter.grad
        assert gradient is not None
        is_embedding = parameter.ndim == 2
        state = self._state(parameter, average=gradient, squares=gradient)
        state["average"].lerp_(gradient, 1 - settings.beta1)
        average, beta2 = state["average"], settings.beta2 if is_embedding else settings.norm_beta2
        in_basis = is_embedding and settings.soap_embedding
        if in_basis:
            gram = gradient.mT @ gradient  # D D
            of_basis = self._state("basis", covariance=gram, basis=gram)
            self._refresh_basis(of_basis, gram)
            gradient, average = gradient @ of_basis["basis"], average @ of_basis["basis"]
        state["squares"].lerp_(gradient.square(), 1 - beta2)
        num_steps = self._step + 1
        divisor = (state["squares"] / (1 - beta2**num_steps)).sqrt() + 1e-8
        update = average / (1 - settings.beta1**num_steps) / divisor
        if in_basis:
            update = update @ of_basis["basis"].mT
        factor = settings.embedding_rate if is_embedding else settings.norm_rate
        parameter.sub_(update, alpha=self._highest_rate * share * factor)


def polar(x: Tensor) -> Tensor:
    """Does what `orthogonalize` does, in as many steps, with Polar Express's coefficients."""
    if x.shape[1] > x.shape[2]:
        return polar(x.mT.contiguous()).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * _POLAR_SAFETY).clamp(min=1e-7)
    for a, b, c in _POLAR:
        gram = x @ x.mT  # S m m
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
