"""Which training of a ladder comes next: the shortest that is missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kiem.model.config import preset
from kiem.planning.ladder_runs import LadderRun

# Sizes of the family of small models, each two to three times as large as the one before.
DEFAULT_MODELS = (
    *("gemma3-0.358m", "gemma3-micro", "gemma3-3.21m", "gemma3-nano", "gemma3-11.9m"),
    *("gemma3-29.1m", "gemma3-89.1m"),
)
TOKENS_PER_STEP = 4096
_SHORTEST_TOKENS = 1 << 18
_FEWEST_LENGTHS = 4
# A rung is trained at the rate that is expected to be best, and at half and twice that. The other
# two wait for rungs of so many times the work: sizes and lengths count more than rates.
_OTHER_RATES_WAIT = 4
_MOST_NOTCHES = 3


class Trial(NamedTuple):
    """A training of a ladder."""

    model: str
    num_steps: int
    learning_rate: float


@dataclass(frozen=True)
class Place:
    """A rung that a ladder may have.

    Attributes:
        num_parameters: with the embedding; work and time are in proportion to them.
        centre: the learning rate that is expected to be best.
    """

    model: str
    num_layer_parameters: int
    num_parameters: int
    num_steps: int
    tokens: int
    centre: float

    def rate(self, notch: int) -> float:
        """Returns the learning rate that is 2 to the power of `notch` times the expected one."""
        return float(f"{self.centre * 2.0**notch:.2g}")

    def missing_notches(self, runs: Sequence[LadderRun]) -> list[int]:
        """Returns the notches (see `rate`) to train next.

        First 0, then -1 and 1, then beyond the best one while that is the last on its side.

        Args:
            runs: the finished ones of this rung.
        """
        found = {run.learning_rate: run.reached for run in runs}
        notches = range(-_MOST_NOTCHES, _MOST_NOTCHES + 1)
        tried = {n: found[self.rate(n)] for n in notches if self.rate(n) in found}
        missing = [notch for notch in (0, 1, -1) if notch not in tried]
        if missing:
            return missing
        best = min(tried, key=tried.__getitem__)
        beyond = best + 1 if best == max(tried) else best - 1
        is_last = best in (min(tried), max(tried)) and abs(beyond) <= _MOST_NOTCHES
        return [beyond] if is_last else []


def default_lengths(num_train_tokens: int) -> list[int]:
    """Returns 2^18 tokens and its doubles, up to the text's; for little text its halves."""
    shortest = min(_SHORTEST_TOKENS, num_train_tokens >> (_FEWEST_LENGTHS - 1))
    num_lengths = max(1, int(math.log2(num_train_tokens / max(1, shortest))) + 1)
    return [shortest << number for number in range(num_lengths)]


def next_trial(
    places: Sequence[Place],
    runs: Sequence[LadderRun],
    measured: Sequence[LadderRun],
    seconds_left: float,
) -> tuple[Trial, float | None] | None:
    """Returns the next training with the seconds that it is expected to take, if one fits.

    Args:
        places: all rungs.
        runs: what is finished.
        measured: runs that tell the speed of this machine; without any the first trial fits, and
            the seconds are None.
        seconds_left: for the training, its start and its evaluation.
    """
    waiting = []
    for place in places:
        of_place = [run for run in runs if (run.model, run.tokens) == (place.model, place.tokens)]
        for notch in place.missing_notches(of_place):
            work = place.tokens * place.num_parameters * (_OTHER_RATES_WAIT if notch else 1)
            waiting.append((work, place, notch))
    for _, place, notch in sorted(waiting, key=lambda entry: entry[0]):
        seconds = _expected_seconds(place, measured) if measured else None
        if seconds_left > (seconds or 0):
            return Trial(place.model, place.num_steps, place.rate(notch)), seconds
    return None


def _expected_seconds(place: Place, measured: Sequence[LadderRun]) -> float:
    """Scales the time of the latest run among those that are nearest in size."""

    def distance(run: LadderRun) -> float:
        return abs(math.log(run.num_layer_parameters / place.num_layer_parameters))

    nearest = min(reversed(measured), key=distance)
    num_parameters = preset(nearest.model, nearest.vocab_size).num_parameters()
    seconds_per_token = nearest.seconds / nearest.tokens * place.num_parameters / num_parameters
    beside = statistics.median(run.wall_seconds - run.seconds for run in measured)
    return place.tokens * seconds_per_token + beside
