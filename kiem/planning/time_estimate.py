"""Estimates of training time, from FLOPs and the published figures of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from kiem.model.config import Gemma3Config
from kiem.planning.memory_estimate import Setting

# The share of the published matrix peak that training programs reach: 40 to 50 %.
_MATRIX_SHARE = 0.45
# Work of a pass by what is computed again; the cheap parts that "selective" repeats take little.
_WORK = {"none": 1.0, "selective": 1.05, "full": 4 / 3}


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: FLOP/s of dense bf16 products, memory, bytes/s to other GPUs."""

    name: str
    matrix_flops: float
    memory_bytes: float
    link_bandwidth: float


# PCIe 4.0 x16 has 32 GB/s in each direction; about 12 are left where GPUs talk through the host.
_PCIE = 12e9
# NVIDIA's data sheets of A10G, L4, L40S, A100 (SXM) and H100 (SXM), and the white papers on GA102
# and Ada for the GeForce cards. Where a sheet gives the rate "with sparsity", half of it is the
# dense one. NVLink's figure is one direction.
GPUS = {
    "a10g": Gpu("NVIDIA A10G", 70e12, 24e9, _PCIE),
    "l4": Gpu("NVIDIA L4", 121e12, 24e9, _PCIE),
    "l40s": Gpu("NVIDIA L40S", 362e12, 48e9, _PCIE),
    "rtx3090": Gpu("NVIDIA RTX 3090", 71e12, 24e9, _PCIE),
    "rtx4090": Gpu("NVIDIA RTX 4090", 165e12, 24e9, _PCIE),
    "a100-40gb": Gpu("NVIDIA A100 40 GB", 312e12, 40e9, 300e9),
    "a100": Gpu("NVIDIA A100 80 GB", 312e12, 80e9, 300e9),
    "h100": Gpu("NVIDIA H100 SXM", 989e12, 80e9, 450e9),
}


def calculate_step_seconds(setting: Setting, accumulation: int, gpu: Gpu) -> float:
    """Returns the time of an update: its passes and the exchange between GPUs.

    The optimizer's work is left out: it takes some 1 % of an update of the usual size.
    """
    # Ring: each GPU sends all but its own part, twice to add up and once to spread. With sharded
    # parameters every pass gathers them twice and sends gradients to their owners.
    rounds = {"none": 2, "optimizer": 3, "parameters": 3 * accumulation}[setting.shard]
    sent_bytes = rounds * 4 * setting.config.num_parameters() * (1 - 1 / setting.world_size)
    num_tokens = accumulation * setting.batch_size * setting.chunk_size
    flops = num_tokens * flops_per_token(setting.config, setting.chunk_size)
    flops *= _WORK[setting.recompute]
    return flops / (gpu.matrix_flops * _MATRIX_SHARE) + sent_bytes / gpu.link_bandwidth


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
