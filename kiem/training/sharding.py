"""How several processes share one model: what each of them holds, how gradients become one.

none: every process holds everything; gradients are added up while the backward pass still runs
(torch's DistributedDataParallel).
optimizer: as none, but each process holds the moments only of the parameters that it owns, updates
those and sends them to the others (ZeRO stage 1, arXiv:1910.02054). Matrices are owned whole, since
Muon needs them whole.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from kiem.training.devices import Devices

Shard = Literal["none", "optimizer"]


class Sharing:
    """A model as one of several processes sees it.

    Args:
        model: the same weights in every process, on its device.
        devices: the processes.
        shard: what each holds only a share of.

    Attributes:
        wrapped: what to call in place of the model in training.
        owned: names of the parameters that this process updates.
    """

    def __init__(self, model: nn.Module, devices: Devices, shard: Shard):
        self._model = model
        self._world_size = devices.world_size
        self._owners: dict[str, int] = {}
        self.wrapped: Any = model
        self.owned = {name for name, _ in model.named_parameters()}
        # malloc would lose memory around gradients that come and go; GPUs' allocators do not.
        self._keeps_gradients = devices.world_size == 1 and devices.device.type == "cpu"
        if self._keeps_gradients:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        if devices.world_size == 1:
            return
        self.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if shard == "optimizer":
            self._owners = owners(model, devices.world_size)
            self.owned = {name for name, rank in self._owners.items() if rank == devices.rank}

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Returns the context of a pass: only the last one of an update exchanges gradients."""
        return nullcontext() if self._world_size == 1 or is_last else self.wrapped.no_sync()

    def clip(self, max_norm: float) -> float:
        """Scales gradients with a larger norm down to `max_norm`; returns the norm before it."""
        return float(clip_grad_norm_(self._model.parameters(), max_norm))

    def finish_update(self) -> None:
        """Sends what this process has updated to the others, and forgets all gradients."""
        sending = [
            dist.broadcast(parameter.data, src=self._owners[name], async_op=True)
            for name, parameter in self._model.named_parameters()
            if name in self._owners
        ]
        for transfer in sending:
            assert transfer is not None  # this process is one of the group
            transfer.wait()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Makes the gradients zero."""
        self._model.zero_grad(set_to_none=not self._keeps_gradients)


def owners(model: nn.Module, world_size: int) -> dict[str, int]:
    """Returns which process updates which parameter, so that all hold about as many values.

    The largest goes first, each to the process that has the least so far.
    """
    num_held = [0] * world_size
    found = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: -item[1].numel()):
        found[name] = num_held.index(min(num_held))
        num_held[found[name]] += parameter.numel()
    return found
