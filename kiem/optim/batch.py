"""Batches: the tensors of one forward pass, and which process gets which chunks of an update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kiem.data.chunks import Chunks
from kiem.model.loss import IGNORE, next_token_targets
from kiem.parallel.distributed import Distributed


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass.

    Attributes:
        ids: int64 [B, T].
        targets: int64 [B, T], the next token at each position, or IGNORE.
        document_starts: int32 [documents + 1], where documents begin, and B * T, if tokens attend
            only to their own; else None.
    """

    ids: Tensor
    targets: Tensor
    document_starts: Tensor | None

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
        ids = self._on_device(chunks).long()
        targets = next_token_targets(ids, self.bos_id, self.pad_id)
        starts = None
        if self.document_mask:
            starts = self._on_device(document_starts(chunks, self.bos_id))
        return Batch(ids, targets, starts)

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # the copy need not wait for what the GPU still has to do
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def document_starts(chunks: np.ndarray, bos_id: int) -> np.ndarray:
    """Returns where documents begin in the tokens of chunks [B, T] one after the other, then B * T.

    A chunk's first token begins one, whatever stands before it in another chunk.

    Returns:
        int32 [documents + 1].
    """
    is_start = chunks == bos_id
    is_start[:, 0] = True
    return np.append(np.flatnonzero(is_start), chunks.size).astype(np.int32)


def own_numbers(numbers: np.ndarray, batch_size: int, distributed: Distributed) -> np.ndarray:
    """Returns which chunks of an update this process reads, [forward passes, batch_size].

    They are dealt out so that the processes together read the same ones, however many they are.
    """
    return numbers.reshape(-1, distributed.world_size, batch_size)[:, distributed.rank]


def micro_batches(
    chunks: Chunks,
    numbers: np.ndarray,
    batch_size: int,
    collate: Collator,
    distributed: Distributed,
) -> list[Batch]:
    """Returns one process's forward passes of an update, of `batch_size` chunks each."""
    deals = own_numbers(numbers, batch_size, distributed)
    return [collate(chunks.read(deal)) for deal in deals]
