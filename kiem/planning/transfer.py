"""The best learning rate of a size and length, from a ladder's runs: rate = c N^b D^d.

N are the parameters in layers, D the training tokens; the form is that of Step Law
(arXiv:2503.04715), which finds b = -0.71 and d = 0.31 for AdamW. Around the best rate the logarithm
of bits per byte is taken for a parabola in the logarithm of the rate, of one curvature for all
rungs. Then every run tells something of the law, and least squares give it at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kiem.planning.ladder_runs import LadderRun, Rung

# The exponent of N for rates that have not been tried at a size. It leads from micro and nano,
# which have been, to nanochat's rate for Muon at the width of gemma3-1b: 0.02 for updates whose
# singular values are 1, which is 0.1 / sqrt(width) = 3e-3 for updates with a root mean square of
# 0.2. kiem's ladder cannot replace it yet (docs/forecast.md).
_SIZE_POWER = -0.4
_UNIT = 1e6
# Farther from the best rate than this factor, bits per byte follow no parabola.
_NEAR = 4.5


class RateLaw(NamedTuple):
    """The fitted law, for N and D in millions.

    Attributes:
        factor: the rate of a million parameters and a million tokens.
        size_power, token_power: the exponents.
        size_error, token_error: their standard errors.
        curvature: a rate that is wrong by a factor of e has this share more bits per byte.
        num_runs: runs that it comes from.
    """

    factor: float
    size_power: float
    token_power: float
    size_error: float
    token_error: float
    curvature: float
    num_runs: int

    def rate(self, num_layer_parameters: float, tokens: float) -> float:
        """Returns the learning rate of a size and length."""
        of_size = (num_layer_parameters / _UNIT) ** self.size_power
        return float(self.factor * of_size * (tokens / _UNIT) ** self.token_power)

    def __str__(self) -> str:
        powers = f"N^{self.size_power:.2f} x D^{self.token_power:.2f}"
        twice = self.curvature * math.log(2) ** 2
        return (
            f"learning rate = {self.factor:.2g} x {powers}, for N million parameters in layers and "
            f"D million tokens (exponents +- {self.size_error:.2f} and {self.token_error:.2f}, "
            f"from {self.num_runs} runs); half or twice that costs {twice:.1%} more bits per byte"
        )


class RateCheck(NamedTuple):
    """What the law of all other rungs says of one that was left out.

    Attributes:
        rung: the one with the most parameters, and the longest of these.
        predicted, found: learning rates.
        lost_bpb: what the predicted rate costs there, by the law's curvature.
    """

    rung: Rung
    predicted: float
    found: float
    lost_bpb: float


def transfer_rate(rate: float, from_size: int, to_size: int) -> float:
    """Returns the learning rate of a size from that of another; sizes are parameters in layers."""
    return float(f"{rate * (to_size / from_size) ** _SIZE_POWER:.2g}")


def fit_rates(rungs: Sequence[Rung]) -> RateLaw | None:
    """Fits the law; None if the runs do not determine it.

    log bpb = a + k (x - m)^2 for the logarithm x of the rate, and m = log c + b log N + d log D:
    with an a for each rung, that is linear in k, k log c, k b and k d.
    """
    known = [(rung, runs) for rung in rungs if len(runs := _near_best(rung)) > 1]
    rows, values = [], []
    for number, (rung, runs) in enumerate(known):
        place = np.log([rung.num_layer_parameters / _UNIT, rung.tokens / _UNIT])
        for run in runs:
            x = math.log(run.learning_rate)
            rows.append([x * x, x, *(x * place), *(float(n == number) for n in range(len(known)))])
            values.append(math.log(run.reached))
    if not rows or len(rows) <= len(rows[0]):
        return None
    matrix, vector = np.array(rows), np.array(values)
    solution, _, rank, _ = np.linalg.lstsq(matrix, vector, rcond=None)
    curvature = float(solution[0])
    if rank < matrix.shape[1] or curvature <= 0:  # one size, one length, or no optimum in sight
        return None
    rest = vector - matrix @ solution
    variance = float(rest @ rest) / (len(vector) - matrix.shape[1])
    errors = np.sqrt(variance * np.diag(np.linalg.inv(matrix.T @ matrix)))[2:4] / (2 * curvature)
    log_factor, of_size, of_tokens = (float(s) for s in -solution[1:4] / (2 * curvature))
    powers = of_size, of_tokens, float(errors[0]), float(errors[1])
    return RateLaw(math.exp(log_factor), *powers, curvature, len(rows))


def check_rates(rungs: Sequence[Rung]) -> RateCheck | None:
    """Leaves out the largest rung that has an optimum; None if the others are too few."""
    last = next((rung for rung in reversed(rungs) if rung.optimum() is not None), None)
    law = fit_rates([rung for rung in rungs if rung is not last])
    if last is None or law is None:
        return None
    optimum = last.optimum()
    assert optimum is not None
    predicted = law.rate(last.num_layer_parameters, last.tokens)
    ratio = math.log(predicted / optimum.learning_rate)
    lost = optimum.bpb * law.curvature * ratio**2
    return RateCheck(last, predicted, optimum.learning_rate, lost)


def _near_best(rung: Rung) -> list[LadderRun]:
    best = min(rung.runs, key=lambda run: run.reached).learning_rate
    return [
        run
        for run in rung.runs
        if math.isfinite(run.reached) and best / _NEAR < run.learning_rate < best * _NEAR
    ]
