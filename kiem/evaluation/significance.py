"""Whether one way of training is better than another, from pairs of runs with the same seed.

The first weights and the order of the text follow from the seed. So a pair shares most of its luck,
and the differences of pairs scatter less than the figures themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_CONFIDENCE = 0.95
_MOST_MORE = 99  # so many more runs are said to be needed at most


@dataclass(frozen=True)
class Comparison:
    """How figures of which less is better differ between pairs of runs.

    Attributes:
        num_pairs: pairs of runs with the same seed.
        gain: mean of how much lower the second figure is; nan without pairs.
        standard_error: of `gain`; nan with fewer than two pairs.
        verdict: on which side of 0 the 95 % interval of the gain lies (Student's t).
        num_more: about how many more pairs would decide, if they scatter alike and their mean stays
            the same; 0 if it is decided, None if too many or if fewer than two pairs tell nothing.
    """

    num_pairs: int
    gain: float
    standard_error: float
    verdict: str
    num_more: int | None

    def __str__(self) -> str:
        """Returns such as "better by 0.012 ± 0.004" or "not decidable; 3 more runs"."""
        if self.num_pairs == 0:
            return "not decidable; no seed in common"
        side = "better" if self.gain > 0 else "worse"
        found = f"{side} by {abs(self.gain):.4f}"
        if self.num_pairs == 1:
            return f"not decidable; at least 1 more run ({found})"
        found += f" ± {self.standard_error:.4f}"
        if self.num_more == 0:
            return found
        more = f"more than {_MOST_MORE}" if self.num_more is None else str(self.num_more)
        return f"not decidable; {more} more run{'' if more == '1' else 's'} ({found})"


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Returns how much lower the figures `after` are; those at the same place are a pair."""
    gains = [old - new for old, new in zip(before, after, strict=True)]
    num_pairs = len(gains)
    if num_pairs < 2:
        gain = gains[0] if gains else math.nan
        return Comparison(num_pairs, gain, math.nan, "not decidable", None)
    gain, deviation = statistics.fmean(gains), statistics.stdev(gains)
    needed = (
        number
        for number in range(num_pairs, num_pairs + _MOST_MORE + 1)
        if abs(gain) > student_t(number - 1) * deviation / math.sqrt(number)
    )
    num_more = next((number - num_pairs for number in needed), None)
    verdict = "not decidable"
    if num_more == 0:
        verdict = "better" if gain > 0 else "worse"
    return Comparison(num_pairs, gain, deviation / math.sqrt(num_pairs), verdict, num_more)


def student_t(freedom: int) -> float:
    """Returns what Student's t exceeds in absolute value with a probability of 5 %.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, 13.0  # 12.706 for one degree, less for more
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < _CONFIDENCE else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Returns the probability of an absolute value below t (Abramowitz and Stegun, 26.7.3 f.)."""
    angle = math.atan(t / math.sqrt(freedom))
    is_odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if is_odd else (1.0, 0.0)
    for power in range(1 + is_odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    if is_odd:
        return (angle + math.sin(angle) * total) * 2 / math.pi
    return math.sin(angle) * total
