"""The order in which training reads the chunks of its directories.

Which chunks an update reads is a function of (order, step), so there is nothing to save for a
resumed run, and an audit can name them years later. Nothing here grows with the length of a run.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kiem.core.randomness import derive_seed

# So many chunks have whole numbers of each part, which are the weights to four digits.
PERIOD = 10_000
# So many consecutive chunks are shuffled, so that no part always has the same place in an update.
_BLOCK = 10
# The smallest updates of the batch's warm-up are one of so many parts of a later one.
WARMUP_PARTS = 4


@dataclass(frozen=True)
class Part:
    """Consecutive chunks, which are read in a new shuffle every epoch.

    Attributes:
        name: what it is called in messages.
        first: number of its first chunk.
        num_chunks: how many there are.
        weight: its share of what is read, relative to the other parts of its stage.
    """

    name: str
    first: int
    num_chunks: int
    weight: float


@dataclass(frozen=True)
class Stage:
    """A stretch of a run, and the parts that it reads.

    Attributes:
        first_step: its first update, from 0; it goes on until the next stage.
        parts: at least one.
    """

    first_step: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ChunkOrder:
    """All that decides which chunks an update reads.

    Attributes:
        stages: one after the other, the first from update 0.
        chunks_per_step: chunks in an update after the batch's warm-up.
        seed: the run's seed.
        batch_warmup_steps: updates of the batch's warm-up; see `count_chunks`.
    """

    stages: tuple[Stage, ...]
    chunks_per_step: int
    seed: int
    batch_warmup_steps: int = 0

    def count_chunks(self, num_steps: int) -> int:
        """Returns how many chunks the first updates read; see `count_chunks`."""
        return count_chunks(num_steps, self.chunks_per_step, self.batch_warmup_steps)


def count_chunks(num_steps: int, chunks_per_step: int, batch_warmup_steps: int) -> int:
    """Returns how many chunks the first updates of a run read.

    In the batch's warm-up the first half of its updates read a quarter of the chunks of a later
    one, the second half of them half: at first a model learns as much from small updates (Merrill
    et al. 2025, arXiv:2505.23971).

    Args:
        num_steps: how many updates.
        chunks_per_step: chunks in an update after the warm-up, with one a multiple of WARMUP_PARTS.
        batch_warmup_steps: updates of the warm-up.
    """
    num_quarter = min(num_steps, batch_warmup_steps // 2)
    num_half = min(num_steps, batch_warmup_steps) - num_quarter
    num_full = num_steps - num_quarter - num_half
    num_parts = num_quarter + 2 * num_half + WARMUP_PARTS * num_full
    return chunks_per_step * num_parts // WARMUP_PARTS


def count_steps(num_chunks: float, chunks_per_step: int, batch_warmup_steps: int) -> int:
    """Returns the fewest updates that read so many chunks; see `count_chunks`."""
    most = math.ceil(num_chunks / chunks_per_step) + batch_warmup_steps
    return bisect_left(
        range(most), num_chunks, key=lambda n: count_chunks(n, chunks_per_step, batch_warmup_steps)
    )


def chunk_numbers(order: ChunkOrder, step: int) -> np.ndarray:
    """Returns the numbers of the chunks that an update reads.

    In any 1000 consecutive chunks of a stage each part has its share, give or take 1 %.

    Args:
        order: that of the run.
        step: the update, from 0.

    Returns:
        int64 [chunks of this update].
    """
    at = max(place for place, stage in enumerate(order.stages) if stage.first_step <= step)
    stage = order.stages[at]
    num_before = order.count_chunks(stage.first_step)
    places = np.arange(order.count_chunks(step), order.count_chunks(step + 1)) - num_before
    which, draws = _draws(stage.parts, places, order.seed, at)
    numbers = np.empty_like(places)
    for place, part in enumerate(stage.parts):
        is_here = which == place
        shuffle = _shuffles(part.num_chunks, order.seed, at, place)
        epochs, offsets = np.divmod(draws[is_here], part.num_chunks)
        pairs = zip(epochs.tolist(), offsets.tolist(), strict=True)
        numbers[is_here] = [part.first + shuffle(epoch)[offset] for epoch, offset in pairs]
    return numbers


def count_reads(order: ChunkOrder, num_steps: int) -> list[list[int]]:
    """Returns how many chunks the first updates read of each part of each stage."""
    ends = [*(stage.first_step for stage in order.stages[1:]), num_steps]
    counts = []
    for at, (stage, end) in enumerate(zip(order.stages, ends, strict=True)):
        end = max(stage.first_step, min(end, num_steps))
        num_chunks = order.count_chunks(end) - order.count_chunks(stage.first_step)
        if len(stage.parts) == 1:
            counts.append([num_chunks])
            continue
        periods, rest = divmod(num_chunks, PERIOD)
        which, _ = _pattern(stage.parts, order.seed, at, periods)
        in_rest = np.bincount(which[:rest], minlength=len(stage.parts))
        in_period = np.bincount(which, minlength=len(stage.parts))
        counts.append((periods * in_period + in_rest).tolist())
    return counts


def _draws(
    parts: tuple[Part, ...], places: np.ndarray, seed: int, stage: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns of which part each place in a stage is, and which of its chunks: how many before."""
    if len(parts) == 1:
        return np.zeros_like(places), places
    which, draws = np.empty_like(places), np.empty_like(places)
    periods, offsets = np.divmod(places, PERIOD)
    for period in np.unique(periods).tolist():
        is_here = periods == period
        in_period, ranks = _pattern(parts, seed, stage, period)
        counts = np.bincount(in_period, minlength=len(parts))
        which[is_here] = in_period[offsets[is_here]]
        draws[is_here] = period * counts[which[is_here]] + ranks[offsets[is_here]]
    return which, draws


@functools.lru_cache(maxsize=4)  # of this period and the next one, in two stages
def _pattern(
    parts: tuple[Part, ...], seed: int, stage: int, period: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each place in a period its part, and how many of that part are before it."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "mixture", stage, period)))
    spread = _spread(tuple(part.weight for part in parts))
    which = generator.permuted(spread.reshape(-1, _BLOCK), axis=1).ravel()
    by_part = np.argsort(which, kind="stable")
    counts = np.bincount(which, minlength=len(parts))
    ranks = np.empty(PERIOD, np.int64)
    ranks[by_part] = np.arange(PERIOD) - np.repeat(np.cumsum(counts) - counts, counts)
    return which, ranks


@functools.lru_cache(maxsize=2)  # of two stages
def _spread(weights: tuple[float, ...]) -> np.ndarray:
    """Returns the part of each place in a period, spread as evenly as can be.

    Before every place each part has its exact share of the places so far, give or take less than 1:
    the next place goes to the part whose next chunk is due first, of those that are not ahead of
    their share (Baruah et al. 1996, Proportionate progress).
    """
    counts = whole_shares(weights)
    given = np.zeros_like(counts)
    spread = np.empty(PERIOD, np.int64)
    for place in range(PERIOD):
        is_behind = given * PERIOD < (place + 1) * counts
        due = -(-(given + 1) * PERIOD // counts)
        spread[place] = np.argmin(np.where(is_behind, due, PERIOD + 1))
        given[spread[place]] += 1
    return spread


def whole_shares(weights: tuple[float, ...]) -> np.ndarray:
    """Returns how many places of a period each part has, int64: by the largest remainders."""
    quotas = PERIOD * np.array(weights) / np.sum(weights)
    counts = np.floor(quotas).astype(np.int64)
    left = PERIOD - int(counts.sum())
    counts[np.argsort(counts - quotas, kind="stable")[:left]] += 1
    return counts


@functools.cache  # there are few parts
def _shuffles(num_chunks: int, seed: int, stage: int, part: int) -> Callable[[int], np.ndarray]:
    """Returns a function from an epoch of a part to its shuffle."""
    # The first part is shuffled as directories were before there were others.
    key = (stage, part) if stage or part else ()

    @functools.lru_cache(maxsize=2)  # of the epoch now and the next one
    def shuffle(epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "order", epoch, *key)))
        return generator.permutation(num_chunks)

    return shuffle
