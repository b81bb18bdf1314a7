"""How several processes share one model: what each of them holds, how gradients become one.

none: every process holds everything; gradients are added up while the backward pass still runs
(torch's DistributedDataParallel).
optimizer: as none, but each process holds the moments only of the parameters that it owns, updates
those and sends them to the others (ZeRO stage 1, arXiv:1910.02054). Matrices are owned whole, since
Muon needs them whole.
parameters: each process holds a share of every parameter, of its gradient and of its moments; the
weights of a layer are gathered while it computes (ZeRO stage 3, by torch's fully_shard).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from kiem.model.gemma3 import Gemma3
from kiem.parallel.distributed import Distributed

Shard = Literal["none", "optimizer", "parameters"]


class ParallelModel:
    """A model as one of several processes sees it.

    Args:
        model: the same weights in every process, on its device, or what `share_parameters` left.
        distributed: the processes.
        shard: what each holds only a share of.

    Attributes:
        wrapped: what to call in place of the model in training.
        owned: names of the parameters that this process updates.
    """

    def __init__(self, model: nn.Module, distributed: Distributed, shard: Shard):
        self._model = model
        self._owners: dict[str, int] = {}
        self.wrapped: Any = model
        self.owned = {name for name, _ in model.named_parameters()}
        # malloc would lose memory around gradients that come and go; GPUs' allocators do not.
        self._keeps_gradients = distributed.world_size == 1 and distributed.device.type == "cpu"
        if self._keeps_gradients:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        # Where gradients are shared out, every pass sends them to their owners: until the last one
        # they would be whole in every process, as large as the weights.
        self._can_wait = distributed.world_size > 1 and shard != "parameters"
        if not self._can_wait:
            return
        self.wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if shard == "optimizer":
            self._owners = owners(model, distributed.world_size)
            self.owned = {name for name, rank in self._owners.items() if rank == distributed.rank}

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Returns the context of a pass: gradients that can wait are exchanged in the last one."""
        return self.wrapped.no_sync() if self._can_wait and not is_last else nullcontext()

    def clip(self, max_norm: float) -> float:
        """Scales gradients with a larger norm down to `max_norm`; returns the norm before it."""
        return float(gather(clip_grad_norm_(self._model.parameters(), max_norm)))

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

    def close(self) -> None:
        """Ends the sharing; the processes must not part before.

        torch's wrapper holds on to their group. Freed after it was destroyed, it waits for gloo's
        thread with Python's lock in its hands, for which that thread may be waiting.
        """
        self.wrapped = None


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


def share_parameters(model: Gemma3, distributed: Distributed) -> None:
    """Leaves each process its share of every parameter, on its device.

    What is there at once beside the shares is a layer or two, and, from the beginning of a pass to
    its end, the embedding, which both ends of it use.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_shared(tensor: Tensor) -> bool:
    """Says whether the processes each hold only a part of a tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes seconds to import


def gather(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Returns the whole of a shared tensor, of another one itself.

    All processes call it for the same tensors in the same order.

    Args:
        tensor: whole or shared.
        device: where to put the whole of a shared one; None: where its parts are.
    """
    if not is_shared(tensor):
        return tensor
    whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole.to(device) if device is not None else whole


def put(target: Any, value: Tensor) -> None:
    """Copies a whole tensor, the same in all processes, into what this one holds of `target`."""
    if is_shared(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements
        value = value.to(target.device)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    target.copy_(value)


def whole_model(model: Gemma3, device: torch.device, is_kept: bool = True) -> Gemma3:
    """Returns a model that a process can call by itself, with the weights of one that is shared.

    All processes call it; one parameter is gathered after the other.

    Args:
        model: shared, or not: then it is returned itself.
        device: where the weights go.
        is_kept: whether this process needs them; if not, it gets a model without data.
    """
    if not any(is_shared(parameter) for parameter in model.parameters()):
        return model
    weights = {}
    for name, parameter in model.named_parameters():
        weight = gather(parameter, device)
        if is_kept:
            weights[name] = weight
    with torch.device("meta"):
        whole = Gemma3(model.config)
    whole.load_state_dict(weights, strict=is_kept, assign=True)
    return whole
