"""Batches: which chunks an update reads, and the tensors of one forward pass.

The chunks are a function of (seed, step), so there is nothing to save for a resumed run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kiem.core.randomness import derive_seed
from kiem.data.chunks import Chunks
from kiem.model.loss import IGNORE, next_token_targets
from kiem.parallel.distributed import Distributed


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass.

    Attributes:
        ids: int64 [B, T].
        targets: int64 [B, T], the next token at each position, or IGNORE.
        bos_id: the token that begins a document, if tokens attend only to their own; else None.
    """

    ids: Tensor
    targets: Tensor
    bos_id: int | None

    @property
    def num_targets(self) -> Tensor:
        """The number of predicted tokens, a scalar on the device."""
        return (self.targets != IGNORE).sum()


@dataclass(frozen=True)
class Collator:
    """Turns chunks into batches.

    Attributes:
        bos_id, pad_id: the tokenizer's.
        document_mask: whether tokens attend only to their own document.
        device: where batches go.
    """

    bos_id: int
    pad_id: int
    document_mask: bool
    device: torch.device

    def __call__(self, chunks: np.ndarray) -> Batch:
        """Returns the batch of chunks [B, T]."""
        ids = torch.from_numpy(chunks).long().to(self.device)
        targets = next_token_targets(ids, self.bos_id, self.pad_id)
        return Batch(ids, targets, self.bos_id if self.document_mask else None)


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
        self._shuffles = {int(epoch): self._shuffle(int(epoch)) for epoch in np.unique(epochs)}
        pairs = zip(epochs, offsets, strict=True)
        return np.array([self._shuffles[int(epoch)][offset] for epoch, offset in pairs])

    def _shuffle(self, epoch: int) -> np.ndarray:
        if epoch in self._shuffles:
            return self._shuffles[epoch]
        generator = np.random.Generator(np.random.PCG64(derive_seed(self._seed, "order", epoch)))
        return generator.permutation(self._num_chunks)


def micro_batches(
    chunks: Chunks,
    numbers: np.ndarray,
    batch_size: int,
    collate: Collator,
    distributed: Distributed,
) -> list[Batch]:
    """Returns one process's forward passes of an update, of `batch_size` chunks each.

    The chunks of an update are dealt out so that the processes together read the same ones, however
    many they are.
    """
    deals = numbers.reshape(-1, distributed.world_size, batch_size)[:, distributed.rank]
    return [collate(chunks.read(deal)) for deal in deals]
