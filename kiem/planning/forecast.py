"""A forecast of bits per byte from a ladder's runs: E + A / N^alpha + B / D^beta.

N are the parameters without the embedding, D the training tokens: the form and the fit of Hoffmann
et al. (arXiv:2203.15556, section 3.3: Huber loss on logarithms). A ladder of an evening decides
some of the five constants badly, so they are also pulled towards what is usual (`_USUAL`), each by
as much as its usual spread allows. The spread of a forecast is that of laws fitted to resampled
rungs, each pulled towards another draw of the usual values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kiem.core.randomness import derive_seed
from kiem.planning.ladder_runs import Rung

# Means and standard deviations of log E, log A, alpha, log B and beta, with N and D in millions.
# The exponents are those of arXiv:2203.15556 (0.34 and 0.28) and of the better fit to its runs
# (arXiv:2404.10102: 0.35 and 0.37). 0.7 bits per byte is what large models need for web text. A and
# B hardly pull.
_USUAL = np.array([[np.log(0.7), np.log(0.5), 0.34, np.log(1.0), 0.34], [0.35, 1.5, 0.1, 1.5, 0.1]])
_UNIT = 1e6
_NUM_DRAWS = 300
# Runs that differ only in their seed differ by half a percent; no law is closer than that.
_SMALLEST_NOISE = 0.005
_NUM_STEPS = 60
_INTERVAL = (2.5, 97.5)
FEWEST_RUNGS = 5


class Forecast(NamedTuple):
    """Expected bits per byte, and the ends of the 95 % interval of what a run reaches."""

    bpb: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.bpb:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Law:
    """The fitted law.

    Attributes:
        constants: log E, log A, alpha, log B, beta, for N and D in millions [5].
        draws: those of resampled rungs [num_draws, 5].
        noise: standard deviation of log bits per byte around the law.
        errors: one for each draw, normally distributed, times `noise` [num_draws].
    """

    constants: np.ndarray
    draws: np.ndarray
    noise: float
    errors: np.ndarray

    def forecast(self, num_layer_parameters: float, tokens: float) -> Forecast:
        """Returns what a training of a size and length is expected to reach."""
        place = np.log([[num_layer_parameters / _UNIT]]), np.log([[tokens / _UNIT]])
        bpb = np.exp(_predict(self.constants[None], *place)[0][0, 0])
        draws = np.exp(_predict(self.draws, *place)[0][:, 0] + self.errors)
        low, high = np.percentile(draws, _INTERVAL)
        return Forecast(float(bpb), float(low), float(high))

    def __str__(self) -> str:
        log_e, log_a, alpha, log_b, beta = self.constants
        e, a, b = np.exp([log_e, log_a, log_b])
        return (
            f"bits per byte = {e:.3f} + {a:.3f} / N^{alpha:.2f} + {b:.3f} / D^{beta:.2f}, for N "
            f"million parameters in layers and D million tokens, within {self.noise:.1%}"
        )


def fit_law(rungs: Sequence[Rung], seed: int = 0) -> Law | None:
    """Fits the law to the best run of each rung; None if there are too few to tell anything.

    Args:
        rungs: of one text, vocabulary and recipe.
        seed: of the resampling.
    """
    sizes = np.array([rung.num_layer_parameters for rung in rungs])
    tokens = np.array([rung.tokens for rung in rungs])
    if len(rungs) < FEWEST_RUNGS or min(len({*sizes}), len({*tokens})) < 2:
        return None
    log_n, log_d = np.log(sizes / _UNIT), np.log(tokens / _UNIT)
    log_bpb = np.log([rung.best for rung in rungs])
    random = np.random.default_rng(derive_seed(seed, "forecast"))
    usual, spread = _USUAL

    # The noise decides how much the usual values weigh, and is what the fit leaves.
    noise, num_rungs = 2 * _SMALLEST_NOISE, len(rungs)
    for _ in range(3):
        every = np.ones((1, num_rungs))
        constants = _fit(log_n, log_d, log_bpb, every, usual[None], noise)
        rest = _predict(constants, log_n, log_d)[0][0] - log_bpb
        free = max(1, num_rungs - len(usual))
        noise = max(_SMALLEST_NOISE, float(np.sqrt(np.sum(rest**2) / free)))

    weights = random.multinomial(num_rungs, [1 / num_rungs] * num_rungs, size=_NUM_DRAWS)
    centres = usual + spread * random.standard_normal((_NUM_DRAWS, len(usual)))
    draws = _fit(log_n, log_d, log_bpb, weights.astype(float), centres, noise)
    return Law(constants[0], draws, noise, noise * random.standard_normal(_NUM_DRAWS))


class LawCheck(NamedTuple):
    """What the law of all smaller sizes says of the largest one, at its greatest length."""

    rung: Rung
    forecast: Forecast
    found: float

    @property
    def holds(self) -> bool:
        """Whether the interval contains what was found."""
        return self.forecast.low <= self.found <= self.forecast.high


def check_law(rungs: Sequence[Rung]) -> LawCheck | None:
    """Leaves out the largest size; None if the others are too few."""
    last = rungs[-1] if rungs else None
    law = fit_law([r for r in rungs if r.num_layer_parameters < rungs[-1].num_layer_parameters])
    if law is None or last is None:
        return None
    return LawCheck(last, law.forecast(last.num_layer_parameters, last.tokens), last.best)


def _predict(
    constants: np.ndarray, log_n: np.ndarray, log_d: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns log bits per byte and how it depends on the constants.

    Args:
        constants: [num_laws, 5].
        log_n, log_d: [num_points], or [1, num_points].

    Returns:
        [num_laws, num_points], and its derivatives [num_laws, num_points, 5].
    """
    log_e, log_a, alpha, log_b, beta = constants.T[:, :, None]
    shape = np.broadcast_shapes(log_e.shape, log_n.shape)
    parts = [log_e, log_a - alpha * log_n, log_b - beta * log_d]
    terms = np.stack([np.broadcast_to(part, shape) for part in parts])
    value = np.logaddexp.reduce(terms)
    of_e, of_n, of_d = np.exp(terms - value)
    return value, np.stack([of_e, of_n, -of_n * log_n, of_d, -of_d * log_d], axis=-1)


def _fit(
    log_n: np.ndarray,
    log_d: np.ndarray,
    log_bpb: np.ndarray,
    weights: np.ndarray,
    centres: np.ndarray,
    noise: float,
) -> np.ndarray:
    """Fits many laws at once, by Levenberg-Marquardt.

    Args:
        log_n, log_d, log_bpb: [num_points].
        weights: how often each point counts [num_laws, num_points].
        centres: what the constants are pulled towards, and begin at [num_laws, 5].
        noise: standard deviation of log bits per byte.
    """
    pull = 1 / _USUAL[1] ** 2

    def residuals(constants: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        value, slopes = _predict(constants, log_n, log_d)
        rest = (value - log_bpb) / noise
        size = np.abs(rest)
        huber = np.where(size < 1, rest**2 / 2, size - 0.5)  # of one standard deviation
        cost = np.sum(weights * huber, 1) + np.sum(pull * (constants - centres) ** 2, 1) / 2
        return rest, slopes / noise, cost

    constants, damping = centres.copy(), np.full(len(centres), 1e-2)
    rest, slopes, cost = residuals(constants)
    for _ in range(_NUM_STEPS):
        share = weights / np.maximum(1, np.abs(rest))
        gradient = np.einsum("lp,lpc->lc", share * rest, slopes) + pull * (constants - centres)
        curvature = np.einsum("lp,lpc,lpd->lcd", share, slopes, slopes) + np.diag(pull)
        steepest = np.einsum("lcc->lc", curvature) * damping[:, None]
        damped = curvature + steepest[:, :, None] * np.eye(len(pull))
        moved = constants - np.linalg.solve(damped, gradient[:, :, None])[:, :, 0]
        new_rest, new_slopes, new_cost = residuals(moved)
        is_better = new_cost < cost
        damping = np.where(is_better, damping / 3, damping * 5)
        constants = np.where(is_better[:, None], moved, constants)
        rest = np.where(is_better[:, None], new_rest, rest)
        slopes = np.where(is_better[:, None, None], new_slopes, slopes)
        cost = np.where(is_better, new_cost, cost)
    return constants
