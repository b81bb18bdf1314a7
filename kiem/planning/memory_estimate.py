"""Estimates of the memory that training takes, from a pass on tensors that have no data.

torch's fake tensors go through the true operations of the model, and their sizes are counted:
nothing here depends on what is in a layer, masks, recomputation or blocks of the loss. Of a deep
model a few layers are run, and each further one is taken to add as much. Memory within an operation
is not seen, nor what an allocator loses.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kiem.config import TrainingOptions
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3, Recompute, run_layer
from kiem.optim.optimizer import make_optimizers
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import Shard, owners

# The share of a GPU's free memory that its allocator can make use of; the rest is lost between
# blocks of different sizes. The trial before a run leaves the same rest free.
GPU_USABLE_SHARE = 0.95
# What fully_shard gathers at once: the layer that computes, and the next one.
_GATHERED_LAYERS = 2
_RECOMPUTE_ABOVE_PARAMETERS = 500_000_000  # on a CPU
# What a model of more layers takes follows from two models of few layers.
_MOST_LAYERS_RUN = 8
_FEW_LAYERS = (2, 3)


@dataclass(frozen=True)
class Setting:
    """What memory and time depend on.

    Attributes:
        device_type: "cpu" or "cuda".
        batch_size: chunks per device in one pass.
        is_compiled: whether torch.compile makes the layers' kernels, which keep less. On a CPU it
            is False, since that depends on the length of the run; the estimate is then too high.
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
    is_compiled: bool


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


class PassCost(NamedTuple):
    """What lives between forward and backward, and at most; weights and gradients included."""

    kept_bytes: int
    peak_bytes: int


class UpdateCost(NamedTuple):
    """What the optimizers of one device keep, use meanwhile, and multiply."""

    moment_bytes: int
    temporary_bytes: int
    flop: int


def setting_of(
    config: Gemma3Config, options: TrainingOptions, distributed: Distributed, chunk_size: int
) -> Setting:
    """Returns what the options determine; the batch size is 1, and nothing is recomputed."""
    device_type = distributed.device.type
    return Setting(
        device_type=device_type,
        config=config,
        chunk_size=chunk_size,
        batch_size=1,
        bf16=distributed.precision == "bf16",
        recompute="none",
        document_mask=options.document_mask,
        optimizer=options.optimizer,
        world_size=distributed.world_size,
        shard=options.shard,
        is_compiled=device_type == "cuda" and options.compile != "never",
    )


def usable_bytes(distributed: Distributed) -> int:
    """Returns what the tensors of a training may take on this process's device.

    That is what is free, and what the process's own allocator holds. To be asked before there are
    weights, which take a part of it.
    """
    if distributed.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(distributed.device)
        free_bytes += torch.cuda.memory_reserved(distributed.device)
        return int(free_bytes * GPU_USABLE_SHARE)
    return int(psutil.virtual_memory().available) // distributed.world_size


def recompute_choices(
    setting: Setting, option: Literal["auto"] | Recompute
) -> tuple[Recompute, ...]:
    """Returns what the backward pass may compute again: the least first.

    On a CPU "auto" goes by the size of the model, so that a resumed run decides alike whatever else
    the machine does; to keep all activations is hardly faster there.
    """
    if option != "auto":
        return (option,)
    if setting.device_type == "cuda":
        return get_args(Recompute)
    is_large = setting.config.num_parameters() > _RECOMPUTE_ABOVE_PARAMETERS
    return ("full",) if is_large else ("none",)


def least_recompute(setting: Setting, usable: int, choices: tuple[Recompute, ...]) -> Recompute:
    """Returns the first of the choices with which the batch takes `usable` bytes, or the last."""
    for recompute in choices[:-1]:
        if estimate_memory(replace(setting, recompute=recompute)).total <= usable:
            return recompute
    return choices[-1]


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
    update = update_cost(setting)
    temporary = one.peak_bytes - 2 * weights - activations
    return Memory(
        weights=held_weights,
        gradients=held_gradients,
        optimizer=update.moment_bytes,
        activations=activations,
        # The update comes when there are no activations any more.
        temporary=max(temporary, update.temporary_bytes - activations),
    )


def update_cost(setting: Setting) -> UpdateCost:
    """Returns what an update costs the device that it costs most."""
    num_owners = setting.world_size if setting.shard == "optimizer" else 1
    cost = dry_update(
        *(setting.device_type, setting.config, setting.optimizer, setting.bf16, num_owners)
    )
    if setting.shard == "parameters":
        share = -(-cost.moment_bytes // setting.world_size)
        return UpdateCost(share, cost.temporary_bytes, cost.flop // setting.world_size)
    return cost


@functools.cache
def dry_update(
    device_type: str,
    config: Gemma3Config,
    optimizer: Literal["adamw", "muon"],
    bf16: bool,
    num_owners: int,
) -> UpdateCost:
    """Runs an update on fake tensors, divided among the owners of parameters."""
    costs = []
    fake, flop_counter = _FakeDevice(device_type), FlopCounterMode(display=False)
    with fake, _Counter() as counter, flop_counter:
        model = Gemma3(config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        owner = owners(model, num_owners)
        for rank in range(num_owners):
            held_bytes, flop = counter.live_bytes, flop_counter.get_total_flops()
            optimizers = make_optimizers(
                *(model, optimizer, 0.0),
                {name for name in owner if owner[name] == rank},
                torch.bfloat16 if bf16 else torch.float32,
            )
            moment_bytes = counter.live_bytes - held_bytes
            counter.peak_bytes = counter.live_bytes
            for each in optimizers:
                each.step()
            costs.append(
                UpdateCost(
                    moment_bytes,
                    counter.peak_bytes - held_bytes - moment_bytes,
                    flop_counter.get_total_flops() - flop,
                )
            )
            del optimizers, each
    return UpdateCost(*map(max, zip(*costs, strict=True)))


@functools.cache
def dry_run(setting: Setting) -> PassCost:
    """Returns the cost of a forward and a backward pass, by running them on fake tensors."""
    config = setting.config
    is_partitioned = setting.is_compiled and setting.recompute == "none"
    run = _partitioned(run_layer) if is_partitioned else run_layer
    if config.num_hidden_layers <= _MOST_LAYERS_RUN:
        return _dry_run(setting, config, run)
    # Of one kind of layer, so that torch.compile is needed once: the others keep as much.
    config = replace(config, sliding_window_pattern=_FEW_LAYERS[1] + 1)
    few, more = (_dry_run(setting, replace(config, num_hidden_layers=n), run) for n in _FEW_LAYERS)
    further_layers = setting.config.num_hidden_layers - _FEW_LAYERS[1]
    return PassCost(*(b + further_layers * (b - a) for a, b in zip(few, more, strict=True)))


def _dry_run(setting: Setting, config: Gemma3Config, run: Callable[..., Tensor]) -> PassCost:
    """Runs the passes for a model, whose layers `run` runs."""
    with warnings.catch_warnings(), _FakeDevice(setting.device_type), _Counter() as counter:
        warnings.filterwarnings("ignore", "The .grad attribute")  # torch.compile looks at it
        model = Gemma3(config)
        model.recompute, model.run_layer = setting.recompute, run
        model.model.embed_tokens.adds_to_gradient = setting.shard != "parameters"
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(setting.batch_size, setting.chunk_size, dtype=torch.int64)
        starts = torch.zeros(setting.batch_size + 1, dtype=torch.int32)  # of documents
        counter.peak_bytes = counter.live_bytes
        # Compiled layers do not keep the weights that autocast has cast for the next layers.
        is_cached = not setting.is_compiled
        with torch.autocast("cpu", torch.bfloat16, setting.bf16, cache_enabled=is_cached):
            loss, nats = model(ids, ids, starts if setting.document_mask else None, 1e-5)
            kept_bytes = counter.live_bytes
        loss.backward()
        del nats
    return PassCost(kept_bytes, counter.peak_bytes)


def _partitioned(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a layer that keeps what torch.compile's partitioner decides, without its kernels.

    The partitioner repeats cheap operations in the backward pass rather than keep their results, so
    a compiled layer keeps about half of what autograd does.
    """
    # These take seconds.
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    torch.compiler.reset()  # a function can be compiled for so many settings only
    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    return torch.compile(run, backend=backend, dynamic=False)


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

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Says that torch.compile may work within it."""
        return True

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
