"""Estimates of the memory that training takes, from a pass on tensors that have no data.

torch's fake tensors go through the true operations of the true model, and their sizes are counted:
nothing here depends on layers, masks, recomputation or blocks of the loss. Memory within an
operation is not seen, nor what an allocator loses.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kiem.config import TrainingOptions
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3, Recompute
from kiem.optim.optimizer import is_hidden_matrix
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import Shard, owners

# The share of a GPU's memory that its allocator can make use of.
GPU_USABLE_SHARE = 0.95
# What fully_shard gathers at once: the layer that computes, and the next one.
_GATHERED_LAYERS = 2
_RECOMPUTE_ABOVE_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class Setting:
    """What memory and time depend on.

    Attributes:
        device_type: "cpu" or "cuda".
        batch_size: chunks per device in one pass.
    """

    device_type: str
    config: Gemma3Config
    chunk_size: int
    batch_size: int
    bf16: bool
    recompute: Recompute
    document_mask: bool
    optimizer: Literal["adamw", "muon"]
    world_size: int
    shard: Shard


@dataclass(frozen=True)
class Memory:
    """Bytes of the tensors that one device has at the peak, by use."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())


class PassMemory(NamedTuple):
    """What lives between forward and backward, and at most; weights and gradients included."""

    kept_bytes: int
    peak_bytes: int


def setting_of(
    config: Gemma3Config, options: TrainingOptions, distributed: Distributed, chunk_size: int
) -> Setting:
    """Returns what the options determine; the batch size is 1."""
    return Setting(
        device_type=distributed.device.type,
        config=config,
        chunk_size=chunk_size,
        batch_size=1,
        bf16=distributed.precision == "bf16",
        recompute=what_to_recompute(options, config),
        document_mask=options.document_mask,
        optimizer=options.optimizer,
        world_size=distributed.world_size,
        shard=options.shard,
    )


def what_to_recompute(options: TrainingOptions, config: Gemma3Config) -> Recompute:
    """Returns what the backward pass computes again: by the option, else by the model's size."""
    if options.activation_checkpointing != "auto":
        return options.activation_checkpointing
    return "full" if config.num_parameters() > _RECOMPUTE_ABOVE_PARAMETERS else "none"


def usable_bytes(distributed: Distributed) -> int:
    """Returns what tensors may take on this process's device, of the memory that is free now."""
    if distributed.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(distributed.device)
        return int(free_bytes * GPU_USABLE_SHARE)
    return int(psutil.virtual_memory().available) // distributed.world_size


def largest_batch(setting: Setting, usable: int, wanted: int) -> int:
    """Returns the first of `wanted`, its half and so on that takes `usable` bytes at most, or 0."""
    size = wanted
    while size and estimate_memory(replace(setting, batch_size=size)).total > usable:
        size //= 2
    return size


def estimate_memory(setting: Setting) -> Memory:
    """Returns the memory at the peak of an update that has several passes."""
    config = setting.config
    weights = held_weights = held_gradients = 4 * config.num_parameters()
    embedding = 4 * config.vocab_size * config.hidden_size
    is_sharded = setting.shard == "parameters"
    # A pass is the same for all other settings.
    shard: Shard = "parameters" if is_sharded else "none"
    one = dry_run(replace(setting, optimizer="adamw", world_size=1, shard=shard))
    # The forward pass of the loss leaves autograd the embedding's gradient.
    gradient_of_loss = embedding if is_sharded else 0
    activations = max(0, one.kept_bytes - 2 * weights - gradient_of_loss)
    if is_sharded:
        # The gradient of the whole embedding is part of `temporary`.
        layers = _GATHERED_LAYERS * (weights - embedding) // config.num_hidden_layers
        share = -(-weights // setting.world_size)
        held_weights, held_gradients = share + embedding + layers, share + layers
    return Memory(
        weights=held_weights,
        gradients=held_gradients,
        optimizer=_optimizer_bytes(setting),
        activations=activations,
        temporary=one.peak_bytes - 2 * weights - activations,
    )


def _optimizer_bytes(setting: Setting) -> int:
    """Returns the bytes of the moments on the device that has most of them."""
    with torch.device("meta"):
        model = Gemma3(setting.config)
    owner = owners(model, setting.world_size) if setting.shard == "optimizer" else {}
    num_bytes = [0] * setting.world_size
    for name, parameter in model.named_parameters():
        by_muon = setting.optimizer == "muon" and is_hidden_matrix(name, parameter)
        num_bytes[owner.get(name, 0)] += 4 * (1 if by_muon else 2) * parameter.numel()
    if setting.shard == "parameters":
        return -(-num_bytes[0] // setting.world_size)
    return max(num_bytes)


@functools.cache
def dry_run(setting: Setting) -> PassMemory:
    """Runs a forward and a backward pass on fake tensors."""
    with _FakeDevice(setting.device_type), _Counter() as counter:
        model = Gemma3(setting.config)
        model.recompute = setting.recompute
        model.model.embed_tokens.adds_to_gradient = setting.shard != "parameters"
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(setting.batch_size, setting.chunk_size, dtype=torch.int64)
        counter.peak_bytes = counter.live_bytes
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
            starts = torch.zeros(1, dtype=torch.int32) if setting.document_mask else None
            loss, nats = model(ids, ids, starts, 1e-5)
            kept_bytes = counter.live_bytes
        loss.backward()
        del nats
    return PassMemory(kept_bytes, counter.peak_bytes)


class _FakeDevice(FakeTensorMode):
    """Fake tensors on the CPU that are computed with as on a device of another type.

    Fake CUDA tensors cannot have gradients where torch is built without CUDA, but a plan for a GPU
    can be made there. `compute.device.device_type` asks for `stands_for`.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.stands_for = device_type


class _Counter(TorchDispatchMode):
    """Counts the bytes of the live tensors that were made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.addmm.dtype_out:  # of which torch 2.11 has no fake version
            return kwargs["out"]
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is None or storage._cdata in self._known:  # a view, or written in place
                continue
            self._known.add(storage._cdata)
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        return out

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes
