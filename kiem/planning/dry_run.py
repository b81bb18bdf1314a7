"""How much memory a pass takes, without taking it: the model runs on tensors that have no data.

torch's fake tensors know shapes, so the true model does its true operations and only their sizes
are counted: nothing has to be told here about layers, masks, recomputation or blocks of the loss.
Memory within an operation is not seen, nor what an allocator loses.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kiem.model.gemma3 import Gemma3, Recompute
from kiem.model.presets import Gemma3Config


@dataclass(frozen=True)
class Pass:
    """Memory of a forward and backward pass, when gradients of an earlier one are held.

    Attributes:
        kept_bytes: what lives between forward and backward, weights and gradients included.
        peak_bytes: the most that lives at once, weights and gradients included.
    """

    kept_bytes: int
    peak_bytes: int


def dry_run(
    config: Gemma3Config,
    batch_size: int,
    chunk_size: int,
    *,
    bf16: bool,
    recompute: Recompute,
    document_mask: bool,
    is_alone: bool = True,
) -> Pass:
    """Runs one pass on fake tensors.

    Args:
        config: the model's shape.
        batch_size: chunks.
        chunk_size: tokens in a chunk.
        bf16: run under autocast.
        recompute: as in `Gemma3`.
        document_mask: whether tokens attend to their own document only.
        is_alone: whether no other device waits for gradients.
    """
    with FakeTensorMode(), _Counter() as counter:
        model = Gemma3(config)
        model.recompute = recompute
        model.model.embed_tokens.adds_to_gradient = is_alone
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(batch_size, chunk_size, dtype=torch.int64)
        counter.peak_bytes = counter.live_bytes
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, nats = model(ids, ids, 0 if document_mask else None, 1e-5)
            kept_bytes = counter.live_bytes
        loss.backward()
        del nats
    return Pass(kept_bytes, counter.peak_bytes)


class _Counter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and live."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:  # a view, or written in place
            return
        self._known.add(storage._cdata)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes
