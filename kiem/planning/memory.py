"""Memory, time and cost of a training, before anything starts: `training.py --plan`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kiem.model.gemma3 import Gemma3, Recompute
from kiem.model.loss import rows_per_block
from kiem.model.presets import Gemma3Config
from kiem.optim.muon import orthogonalize_flops
from kiem.optim.optimizer import is_hidden_matrix
from kiem.parallel.parallel_model import Shard, owners
from kiem.planning.dry_run import Pass, dry_run
from kiem.planning.flops import flops_per_token
from kiem.planning.gpus import Gpu

# What a GPU's driver, libraries and allocator keep beyond the tensors: some 0.6 GB, and a share.
GPU_BASE_BYTES = 600_000_000
GPU_USABLE_SHARE = 0.95
# Of the published peaks, what training programs reach: 40 to 50 % of the matrix peak at this size.
_MATRIX_SHARE = 0.45
_MEMORY_SHARE = 0.8
# What fully_shard gathers at once: the layer that computes, and the next one.
_WHOLE_LAYERS = 2
# Work of a pass with what is computed again: of selective, the cheap parts take a little.
_WORK = {"none": 1.0, "selective": 1.05, "full": 4 / 3}


@dataclass(frozen=True)
class Setting:
    """What decides about memory and time.

    Attributes:
        config: the model's shape.
        chunk_size: tokens in a chunk.
        batch_size: chunks in a pass of a device.
        bf16: whether passes run under autocast.
        recompute: what is computed again for the backward pass.
        document_mask: whether tokens attend to their own document only.
        optimizer: adamw or muon.
        world_size: devices.
        shard: what each device holds only a share of.
    """

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
    """Bytes that one device needs, by what for; `temporary` is what comes and goes beyond."""

    base: int
    weights: int
    gradients: int
    optimizer: int
    compute_copy: int
    activations: int
    logits: int
    temporary: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())


def memory_of(setting: Setting, base_bytes: int) -> Memory:
    """Returns the memory at the peak of an update that has several passes.

    Args:
        setting: what is trained how.
        base_bytes: what the program holds before it makes a model.
    """
    config = setting.config
    weights = 4 * config.num_parameters()
    embedding = 4 * config.vocab_size * config.hidden_size
    # The loss casts the embedding in slices.
    compute_copy = (weights - embedding) // 2 if setting.bf16 else 0
    is_alone = setting.world_size == 1
    world_size = min(setting.world_size, 2)  # more make no difference to a pass
    one = _dry_run(replace(setting, optimizer="adamw", world_size=world_size, shard="none"))
    # With other devices, the backward pass of the loss has the embedding's gradient ready.
    ready = 0 if is_alone else embedding
    activations = max(0, one.kept_bytes - 2 * weights - compute_copy - ready)
    beyond = max(0, one.peak_bytes - 2 * weights - compute_copy - activations)
    most_rows = rows_per_block(config.vocab_size, 2 if setting.bf16 else 4)
    rows = min(most_rows, setting.batch_size * setting.chunk_size)
    logits = min(beyond, rows * config.vocab_size * (4 + 2 * setting.bf16))
    held_weights = held_gradients = weights
    if setting.shard == "parameters":
        # The whole gradient of the embedding is counted with the loss.
        layers = _WHOLE_LAYERS * (weights - embedding) // config.num_hidden_layers
        share = _share(weights, setting.world_size)
        held_weights, held_gradients = share + embedding + layers, share + layers
    return Memory(
        base=base_bytes,
        weights=held_weights,
        gradients=held_gradients,
        optimizer=_optimizer_bytes(setting),
        compute_copy=compute_copy,
        activations=activations,
        logits=logits,
        temporary=beyond - logits,
    )


@functools.cache
def _dry_run(setting: Setting) -> Pass:
    return dry_run(
        setting.config,
        setting.batch_size,
        setting.chunk_size,
        bf16=setting.bf16,
        recompute=setting.recompute,
        document_mask=setting.document_mask,
        is_alone=setting.world_size == 1,
    )


def _optimizer_bytes(setting: Setting) -> int:
    """Returns the bytes of the moments in the device that has most of them."""
    if setting.shard == "parameters":
        return _share(2 * 4 * setting.config.num_parameters(), setting.world_size)
    with torch.device("meta"):
        model = Gemma3(setting.config)
    owner = owners(model, setting.world_size) if setting.shard == "optimizer" else {}
    held = [0] * setting.world_size
    for name, parameter in model.named_parameters():
        by_muon = setting.optimizer == "muon" and is_hidden_matrix(name, parameter)
        held[owner.get(name, 0)] += 4 * (1 if by_muon else 2) * parameter.numel()
    return max(held)


def _share(num_bytes: int, world_size: int) -> int:
    return -(-num_bytes // world_size)


@dataclass(frozen=True)
class Seconds:
    """Time of the parts of an update; a pass exchanges weights and gradients if they are shared."""

    forward_backward: float
    update: float
    exchange: float = 0.0


def calculate_seconds(setting: Setting, gpu: Gpu) -> Seconds:
    """Returns the time of a pass, an update and the exchange between GPUs, from published figures.

    Args:
        setting: what is trained how.
        gpu: on which GPUs.
    """
    config, num_devices = setting.config, setting.world_size
    matrix_flops = gpu.matrix_flops * _MATRIX_SHARE
    flops = flops_per_token(config, setting.chunk_size) * _WORK[setting.recompute]
    num_parameters = config.num_parameters()
    # Weight, gradient and moments are read; weight and moments are written.
    held = num_parameters // (num_devices if setting.shard == "parameters" else 1)
    moved = 3 * 4 * held + 2 * _optimizer_bytes(setting)
    products = 0.0
    if setting.optimizer == "muon":
        products = _orthogonalization_flops(setting)
        products /= num_devices if setting.shard == "optimizer" else 1
    # Ring: each GPU sends all but its own part, twice to add up and once to spread. With shared
    # parameters every pass gathers them twice and sends gradients to their owners.
    one_round = (num_devices - 1) / num_devices * 4 * num_parameters / gpu.link_bandwidth
    rounds = {"none": 2, "optimizer": 3, "parameters": 0}[setting.shard]
    pass_rounds = 3 if setting.shard == "parameters" else 0
    computing = setting.batch_size * setting.chunk_size * flops / matrix_flops
    return Seconds(
        forward_backward=computing + pass_rounds * one_round,
        update=moved / (gpu.memory_bandwidth * _MEMORY_SHARE) + products / matrix_flops,
        exchange=rounds * one_round,
    )


def _orthogonalization_flops(setting: Setting) -> float:
    """Returns the FLOP with which Muon makes the updates of all hidden matrices orthogonal."""
    config = setting.config
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    widths = (queries, keys, keys, queries, *[config.intermediate_size] * 3)
    flops = sum(orthogonalize_flops(width, config.hidden_size, dtype) for width in widths)
    return config.num_hidden_layers * flops
