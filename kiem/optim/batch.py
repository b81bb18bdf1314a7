"""Which chunks an update reads: a function of (seed, step), so there is nothing to save."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kiem.core.randomness import derive_seed
from kiem.data.chunks import Chunks
from kiem.parallel.distributed import Distributed


class Order:
    """The order in which training reads chunks: a new shuffle every epoch.

    Args:
        num_chunks: chunks in the split.
        seed: the run's seed.
    """

    def __init__(self, num_chunks: int, seed: int):
        self._num_chunks = num_chunks
        self._seed = seed
        self._shuffles: dict[int, np.ndarray] = {}

    def chunks(self, step: int, chunks_per_step: int) -> np.ndarray:
        """Returns the chunk numbers that update `step` (from 0) reads, int64 [chunks_per_step]."""
        first = step * chunks_per_step
        places = np.arange(first, first + chunks_per_step)
        epochs, offsets = np.divmod(places, self._num_chunks)
        wanted = {int(epoch): self._shuffle(int(epoch)) for epoch in np.unique(epochs)}
        self._shuffles = wanted
        pairs = zip(epochs, offsets, strict=True)
        return np.array([wanted[int(epoch)][offset] for epoch, offset in pairs])

    def _shuffle(self, epoch: int) -> np.ndarray:
        if epoch in self._shuffles:
            return self._shuffles[epoch]
        generator = np.random.Generator(np.random.PCG64(derive_seed(self._seed, "order", epoch)))
        return generator.permutation(self._num_chunks)


def micro_batches(
    chunks: Chunks, numbers: np.ndarray, batch_size: int, distributed: Distributed
) -> list[Tensor]:
    """Returns one process's forward passes of an update, each int64 [batch_size, chunk_size].

    The chunks of an update are dealt out so that the processes together read the same ones, however
    many they are.
    """
    deals = numbers.reshape(-1, distributed.world_size, batch_size)[:, distributed.rank]
    return [torch.from_numpy(chunks.read(deal)).long().to(distributed.device) for deal in deals]
