"""The learning rate of a size and length, from a ladder's runs: rate = c N^b D^d.

N are the parameters without the embedding, D the training tokens; the form is that of Step Law
(arXiv:2503.04715), which finds b = -0.71 and d = 0.31 for AdamW. It is fitted to the vertices of
parabolas of bits per byte over the log of the rate, one for each rung with three rates or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kiem.planning.ladder_runs import Rung

_UNIT = 1e6
FEWEST_RUNGS = 4


class RateLaw(NamedTuple):
    """The fitted law, for N and D in millions.

    Attributes:
        factor: the rate of a million parameters and a million tokens.
        size_power, token_power: the exponents; `size_error` and `token_error` are their standard
            errors.
        num_rungs: rungs with an optimum between their rates.
    """

    factor: float
    size_power: float
    token_power: float
    size_error: float
    token_error: float
    num_rungs: int

    def rate(self, num_layer_parameters: float, tokens: float) -> float:
        """Returns the learning rate of a size and length."""
        of_size = (num_layer_parameters / _UNIT) ** self.size_power
        return float(self.factor * of_size * (tokens / _UNIT) ** self.token_power)

    def __str__(self) -> str:
        powers = f"N^{self.size_power:.2f} x D^{self.token_power:.2f}"
        return (
            f"learning rate = {self.factor:.2g} x {powers}, for N million parameters in layers and "
            f"D million tokens (exponents +- {self.size_error:.2f} and {self.token_error:.2f}, "
            f"from {self.num_rungs} rungs)"
        )


def fit_rates(rungs: Sequence[Rung]) -> RateLaw | None:
    """Fits the law by least squares of logarithms; None if there are too few optima to tell."""
    known = [(rung, best) for rung in rungs if (best := rung.optimum()) is not None]
    if len(known) < FEWEST_RUNGS:
        return None
    sizes, tokens = (
        [np.log(getattr(rung, name) / _UNIT) for rung, _ in known]
        for name in ("num_layer_parameters", "tokens")
    )
    rows = np.stack([np.ones(len(known)), sizes, tokens], axis=1)
    logs = np.log([best.learning_rate for _, best in known])
    solution, _, rank, _ = np.linalg.lstsq(rows, logs, rcond=None)
    if rank < len(solution):  # one size or one length
        return None
    rest = logs - rows @ solution
    variance = float(rest @ rest) / max(1, len(known) - len(solution))
    errors = np.sqrt(variance * np.diag(np.linalg.inv(rows.T @ rows)))
    factor, of_size, of_tokens = float(np.exp(solution[0])), *map(float, solution[1:])
    return RateLaw(factor, of_size, of_tokens, float(errors[1]), float(errors[2]), len(known))


# What the ladder in ladder.jsonl gives, for updates of 4096 tokens.
EXPECTED = RateLaw(0.0155, -0.25, 0.0, 0.0, 0.0, 0)


def expected_rate(num_layer_parameters: int, tokens: int) -> float:
    """Returns the learning rate that is expected to be best, for updates of 4096 tokens."""
    return EXPECTED.rate(num_layer_parameters, tokens)


class RateCheck(NamedTuple):
    """What the law of all other rungs says of one that was left out.

    Attributes:
        rung: the one with the most parameters, and the longest of these.
        predicted, found: learning rates.
        lost_bpb: what the predicted rate costs there, by the parabola.
    """

    rung: Rung
    predicted: float
    found: float
    lost_bpb: float


def check_rates(rungs: Sequence[Rung]) -> RateCheck | None:
    """Leaves out the largest rung that has an optimum; None if the others are too few."""
    known = [rung for rung in rungs if rung.optimum() is not None]
    law = fit_rates(known[:-1])
    if law is None:
        return None
    last = known[-1]
    optimum, parabola = last.optimum(), last.parabola()
    assert optimum is not None
    assert parabola is not None
    predicted = law.rate(last.num_layer_parameters, last.tokens)
    lost = float(np.polyval(parabola, np.log(predicted))) - optimum.bpb
    return RateCheck(last, predicted, optimum.learning_rate, lost)
