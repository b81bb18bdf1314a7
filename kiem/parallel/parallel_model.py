"""One model in several processes: what each process holds, and how gradients become one.

none: every process holds everything; gradients are added up while the backward pass still runs
(torch's DistributedDataParallel).
optimizer: as none, but each process holds the moments of its own parameters only, updates those
and sends them to the others (ZeRO stage 1, arXiv:1910.02054). Matrices are not split, since Muon
needs them whole.
parameters: each process holds a shard of every parameter, of its gradient and of its moments; the
weights of a layer are gathered while it computes (ZeRO stage 3, torch's fully_shard).
"""

from __future__ import annotations

from collections.abc import Callable
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
    """A model as one of several processes trains it; call it in place of the module.

    Args:
        module: the same weights in every process, on its device, or sharded by `shard_parameters`.
        distributed: the processes.
        shard: what each holds only a part of.

    Attributes:
        local_params: names of the parameters that this process updates.
    """

    def __init__(self, module: Gemma3, distributed: Distributed, shard: Shard):
        self.module = module
        self._device = distributed.device
        # Whole gradients are made once, before DDP, which then turns them into views of what it
        # sends. Those made in passes that do not send would lie beside it, as large as the weights.
        self._keeps_gradients = shard != "parameters"
        if self._keeps_gradients:
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
        # With sharded gradients every pass sends them to their owners: unsent ones would be whole
        # in every process, as large as the weights.
        self._has_ddp = distributed.world_size > 1 and shard != "parameters"
        self._wrapped: Any = module
        if self._has_ddp:
            # The weights are the same already (kiem/parallel/agreement.py, and checkpoints).
            self._wrapped = DistributedDataParallel(
                module, gradient_as_bucket_view=True, init_sync=False
            )
        self._owners = owners(module, distributed.world_size) if shard == "optimizer" else {}
        rank, names = distributed.rank, [name for name, _ in module.named_parameters()]
        self.local_params = {name for name in names if self._owners.get(name, rank) == rank}

    def __call__(self, *inputs: Any) -> Any:
        """Does a forward pass, whose backward pass adds up gradients over all processes."""
        return self._wrapped(*inputs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Returns the context of a pass whose gradients can wait for a later pass to be sent."""
        return self._wrapped.no_sync() if self._has_ddp else nullcontext()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scales gradients with a larger norm down to `max_norm`.

        Returns:
            The norm before it, a scalar on the device, for which the host does not wait.
        """
        return full_tensor(clip_grad_norm_(self.module.parameters(), max_norm))

    def broadcast_local_params(self) -> None:
        """Sends the parameters that each process has updated to the others, if they are divided."""
        sending = [
            dist.broadcast(parameter.data, src=self._owners[name], async_op=True)
            for name, parameter in self.module.named_parameters()
            if name in self._owners
        ]
        for transfer in sending:
            assert transfer is not None  # this process is in the group
            transfer.wait()

    def zero_grad(self) -> None:
        """Makes the gradients zero."""
        self.module.zero_grad(set_to_none=not self._keeps_gradients)

    def full_model(self) -> Gemma3:
        """Returns a model that each process can call by itself; all processes call this."""
        return full_model(self.module, self._device)

    def close(self) -> None:
        """Frees torch's wrapper, which must happen before the process group is destroyed.

        Freed later, it waits for gloo's thread while it holds Python's lock, for which that thread
        may be waiting.
        """
        self._wrapped = None


def owners(model: nn.Module, world_size: int) -> dict[str, int]:
    """Returns which process updates which parameter, so that all hold about as many values.

    The largest goes first, each to the process that has the least so far.
    """
    num_values = [0] * world_size
    found = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: -item[1].numel()):
        found[name] = num_values.index(min(num_values))
        num_values[found[name]] += parameter.numel()
    return found


def shard_parameters(model: Gemma3, distributed: Distributed) -> None:
    """Leaves each process its shard of every parameter, on its device.

    Whole at one time are a layer or two, and during a pass the embedding, which is tied to the
    output. In a run in bf16 layers are sent in bf16, since their products take nothing else;
    gradients are added in fp32, and what goes into a layer stays as it is.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=distributed.matrix_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether each process holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes seconds to import


def num_shards(tensor: Tensor) -> int:
    """Returns how many processes hold a part of a tensor: 1 if it is whole."""
    return tensor.device_mesh.size() if is_sharded(tensor) else 1  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """Returns what this process holds of a tensor: its memory, not a copy."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sum_over_shards(values: Tensor, tensor: Tensor) -> Tensor:
    """Returns the sum of what each process found in its part of a tensor; all call it alike."""
    if is_sharded(tensor):
        dist.all_reduce(values)
    return values


def on_whole_matrices(compute: Callable[[Tensor], Tensor], shards: Tensor, num_rows: int) -> Tensor:
    """Applies a function to matrices of which each process holds some rows.

    Each process gets its share of the S matrices whole, W of them, applies the function to them,
    and sends the rows of the results back. All processes call it alike.

    Args:
        compute: takes matrices [W, m, n], and returns as many of that shape.
        shards: [S, r, n], this process's rows as fully_shard deals them: the same number R for
            each process, as long as there are any left.
        num_rows: m.

    Returns:
        This process's rows of the results, [S, r, n].
    """
    world_size = dist.get_world_size()
    num_matrices, num_own, columns = shards.shape
    rows, share = -(-num_rows // world_size), -(-num_matrices // world_size)  # R, W
    sent = shards.new_zeros(world_size * share, rows, columns)
    sent[:num_matrices, :num_own] = shards
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    by_process = received.unflatten(0, (world_size, share))  # P W R n
    whole = by_process.transpose(0, 1).flatten(1, 2)  # W (P R) n, with rows of zeros at the end
    whole[:, :num_rows] = compute(whole[:, :num_rows])
    by_process = whole.unflatten(1, (world_size, rows)).transpose(0, 1)  # P W R n
    sent = by_process.flatten(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received[:num_matrices, :num_own]


def full_tensor(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Returns the whole of a sharded tensor, on `device` or where it was; another one itself.

    All processes call it for the same tensors in the same order.
    """
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole.to(device) if device is not None else whole


def copy_full_tensor(target: Any, value: Tensor) -> None:
    """Copies a whole tensor, the same in all processes, into this one's part of `target`."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements
        value = value.to(target.device)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    target.copy_(value)


def full_model(model: Gemma3, device: torch.device, is_kept: bool = True) -> Gemma3:
    """Returns a model that a process can call by itself: of a sharded one, a copy on `device`.

    All processes call it; one parameter is gathered after the other. A process that does not keep
    the weights (`is_kept`) gets a model without data.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return model
    weights = {}
    for name, parameter in model.named_parameters():
        weight = full_tensor(parameter, device)
        if is_kept:
            weights[name] = weight
    with torch.device("meta"):
        whole = Gemma3(model.config)
    whole.load_state_dict(weights, strict=is_kept, assign=True)
    return whole
