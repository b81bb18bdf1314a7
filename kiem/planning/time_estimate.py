"""Estimates of training time on GPUs that are not there, from published figures of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kiem.compute.cross_entropy import GPU_BLOCK_BYTES
from kiem.model.config import Gemma3Config
from kiem.planning.memory_estimate import Setting, estimate_memory, update_cost

# The share of the published bandwidth that kernels reach which only move data.
_BANDWIDTH_SHARE = 0.8
# Bytes moved for each value. Weights of layers in bf16: cast once a pass; their gradients in bf16
# written, cast, and added to the fp32 ones.
_CAST_BYTES, _GRADIENT_BYTES = 4 + 2, 2 + (2 + 4) + (4 + 4 + 4)
# The embedding in each block of the loss: its bf16 copy is read by two products, its gradient is
# read and written.
_BLOCK_BYTES = 2 * 2 + 2 * 4
# A logit: written in fp32, read twice; its gradient written in bf16, read by two products.
_LOGIT_BYTES = 4 + 2 * 4 + 2 + 2 * 2
# A gradient at an update: its norm, clipping and setting to zero; and what the optimizer reads and
# writes of gradient, weight and moments, for AdamW and about as much for Muon.
_CLIP_BYTES, _OPTIMIZER_BYTES = 4 + 8 + 4, 4 + 8 + 16
# What is kept for the backward pass is written and read, and its gradient moves as much; products
# do a part of that themselves.
_ACTIVATION_MOVES = 3


@dataclass(frozen=True)
class Gpu:
    """What is known of a GPU.

    Attributes:
        matrix_flops: FLOP/s of dense bf16 products, published.
        product_share: the part of it that products of training reach, calculated.
        memory_bytes, memory_bandwidth: published.
        link_bandwidth: bytes/s to other GPUs, in one direction.
    """

    name: str
    matrix_flops: float
    product_share: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


# PCIe 4.0 x16 has 32 GB/s in each direction; about 12 are left where GPUs talk through the host.
_PCIE = 12e9
# NVIDIA's data sheets of A10G, L4, L40S, A100, H100 and H200 (SXM), and the white papers on GA102
# and Ada for the GeForce cards. Where a sheet gives the rate "with sparsity", half of it is the
# dense one.
#
# product_share: the fastest bf16 product that was measured on each (TFLOP/s: A10G 69.7, L4 91.4,
# L40S 252, 3090 78, 4090 178.8, A100 267.9, H100 821.2: github.com/mag-/gpu_benchmark), times the
# share of it that training reaches. That share is chosen, not measured: 63 % give gemma3-1b the
# middle of what good code reaches, 55 000 to 65 000 tokens/s on an H100 and 5 500 to 6 200 on an
# A10G; 80 % on an A100 follow from 22 112 tokens/s of llm-foundry's 1.3B there, 60 % of its peak
# (github.com/mosaicml/llm-foundry, scripts/train/benchmarking, chunks of 1024).
GPUS = {
    "a10g": Gpu("NVIDIA A10G", 70e12, 0.63, 24e9, 600e9, _PCIE),
    "l4": Gpu("NVIDIA L4", 121e12, 0.48, 24e9, 300e9, _PCIE),
    "l40s": Gpu("NVIDIA L40S", 362e12, 0.44, 48e9, 864e9, _PCIE),
    "rtx3090": Gpu("NVIDIA RTX 3090", 71e12, 0.69, 24e9, 936e9, _PCIE),
    "rtx4090": Gpu("NVIDIA RTX 4090", 165e12, 0.68, 24e9, 1008e9, _PCIE),
    "a100-40gb": Gpu("NVIDIA A100 40 GB", 312e12, 0.69, 40e9, 1555e9, 300e9),
    "a100": Gpu("NVIDIA A100 80 GB", 312e12, 0.69, 80e9, 2039e9, 300e9),
    "h100": Gpu("NVIDIA H100 SXM", 989e12, 0.52, 80e9, 3350e9, 450e9),
    "h200": Gpu("NVIDIA H200 SXM", 989e12, 0.52, 141e9, 4800e9, 450e9),
}


def calculate_step_seconds(setting: Setting, accumulation: int, gpu: Gpu) -> float:
    """Returns the time of an update: products, what moves through memory, and between GPUs.

    Nothing of it is taken to overlap, and the host to keep up.
    """
    update = update_cost(setting)
    flop = accumulation * _pass_flop(setting) + update.flop
    moved_bytes = accumulation * _pass_moved_bytes(setting) + _update_moved_bytes(setting)
    return (
        flop / (gpu.matrix_flops * gpu.product_share)
        + moved_bytes / (gpu.memory_bandwidth * _BANDWIDTH_SHARE)
        + _sent_bytes(setting, accumulation) / gpu.link_bandwidth
    )


def _pass_flop(setting: Setting) -> float:
    """Returns the FLOP of a pass; full recomputation repeats the layers, but never the loss."""
    config = setting.config
    of_all = flops_per_token(config, setting.chunk_size)
    of_layers = of_all - 6 * config.vocab_size * config.hidden_size
    repeated = of_layers / 3 if setting.recompute == "full" else 0.0
    return setting.batch_size * setting.chunk_size * (of_all + repeated)


def _pass_moved_bytes(setting: Setting) -> float:
    """Returns what a pass moves through memory beside the factors and results of its products."""
    config, num_tokens = setting.config, setting.batch_size * setting.chunk_size
    embedding = config.vocab_size * config.hidden_size
    in_layers = config.num_parameters() - embedding
    num_blocks = math.ceil(num_tokens / (GPU_BLOCK_BYTES // (6 * config.vocab_size)))
    all_kept = estimate_memory(replace(setting, recompute="none", world_size=1, shard="none"))
    is_repeated = setting.recompute != "none"
    return (
        all_kept.activations * (_ACTIVATION_MOVES + is_repeated)
        + in_layers * (_CAST_BYTES * (1 + is_repeated) + _GRADIENT_BYTES)
        + embedding * (_CAST_BYTES + num_blocks * _BLOCK_BYTES)
        + num_tokens * config.vocab_size * _LOGIT_BYTES
    )


def _update_moved_bytes(setting: Setting) -> float:
    num_parameters = setting.config.num_parameters()
    num_clipped = num_parameters / (setting.world_size if setting.shard == "parameters" else 1)
    num_updated = num_parameters / (1 if setting.shard == "none" else setting.world_size)
    return num_clipped * _CLIP_BYTES + num_updated * _OPTIMIZER_BYTES


def _sent_bytes(setting: Setting, accumulation: int) -> float:
    """Returns what a device sends for an update.

    Ring: each GPU sends all but its own part, twice to add up gradients and once to spread weights.
    With sharded parameters every pass gathers the layers twice, in the precision of products, and
    the embedding once, and sends gradients to their owners.
    """
    config = setting.config
    num_parameters, embedding = config.num_parameters(), config.vocab_size * config.hidden_size
    if setting.shard == "parameters":
        gathered = 2 * (2 if setting.bf16 else 4) * (num_parameters - embedding) + 4 * embedding
        sent_bytes = accumulation * (gathered + 4 * num_parameters)
    else:
        sent_bytes = 4 * num_parameters * (3 if setting.shard == "optimizer" else 2)
    return sent_bytes * (1 - 1 / setting.world_size)


def flops_per_token(config: Gemma3Config, chunk_size: int) -> float:
    """Returns the FLOP of a token in training, forward and backward; no recomputation.

    6 for every parameter, the tied embedding once, since only its use as output layer multiplies;
    and 12 x query width for every key that a token looks at (PaLM, arXiv:2204.02311, appendix B,
    which counts chunk_size keys everywhere). Here keys are what causal attention and the sliding
    window leave, on average over a chunk; documents that end within it are not taken into account.

    Args:
        config: the model's shape.
        chunk_size: tokens that attend to each other.
    """
    query_width = config.num_attention_heads * config.head_dim
    window = min(config.sliding_window, chunk_size)
    keys_sliding = window - window * (window - 1) / 2 / chunk_size
    keys_full = (chunk_size + 1) / 2
    keys = sum(
        keys_sliding if config.is_sliding(layer) else keys_full
        for layer in range(config.num_hidden_layers)
    )
    return 6 * config.num_parameters() + 12 * query_width * keys
