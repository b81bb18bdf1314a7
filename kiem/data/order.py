"""The order in which training reads the chunks of a split.

Which chunks an update reads is a function of (seed, step), so there is nothing to save for a
resumed run, and an audit can name them years later.
"""

from __future__ import annotations

import functools

import numpy as np

from kiem.core.randomness import derive_seed


def chunk_numbers(step: int, chunks_per_step: int, num_chunks: int, seed: int) -> np.ndarray:
    """Returns which chunks an update reads: all in a new shuffle every epoch.

    Args:
        step: the update, from 0.
        chunks_per_step: chunks in an update.
        num_chunks: chunks in the split.
        seed: the run's seed.

    Returns:
        int64 [chunks_per_step].
    """
    first = step * chunks_per_step
    epochs, offsets = np.divmod(np.arange(first, first + chunks_per_step), num_chunks)
    shuffles = {epoch: _shuffle(num_chunks, seed, int(epoch)) for epoch in np.unique(epochs)}
    pairs = zip(epochs, offsets, strict=True)
    return np.array([shuffles[epoch][offset] for epoch, offset in pairs])


@functools.lru_cache(maxsize=2)  # of the epoch now and the next one
def _shuffle(num_chunks: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "order", epoch)))
    return generator.permutation(num_chunks)
