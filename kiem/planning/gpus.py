"""Published figures of GPUs, for plans."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says of a GPU.

    Attributes:
        name: what it is called.
        matrix_flops: dense bf16 products with fp32 sums, FLOP/s.
        memory_bytes: memory.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s that one GPU can send to the others in the same machine.
    """

    name: str
    matrix_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


# PCIe 4.0 x16 has 32 GB/s in each direction; about 12 are left where GPUs talk through the host.
_PCIE = 12e9

# NVIDIA's data sheets of A10G, L4, L40S, A100 (SXM) and H100 (SXM), and the white papers on GA102
# and Ada for the GeForce cards. Where a sheet gives the rate "with sparsity", half of it is the
# dense one. NVLink's figure is one direction.
GPUS = {
    "a10g": Gpu("NVIDIA A10G", 70e12, 24e9, 600e9, _PCIE),
    "l4": Gpu("NVIDIA L4", 121e12, 24e9, 300e9, _PCIE),
    "l40s": Gpu("NVIDIA L40S", 362e12, 48e9, 864e9, _PCIE),
    "rtx3090": Gpu("NVIDIA RTX 3090", 71e12, 24e9, 936e9, _PCIE),
    "rtx4090": Gpu("NVIDIA RTX 4090", 165e12, 24e9, 1008e9, _PCIE),
    "a100-40gb": Gpu("NVIDIA A100 40 GB", 312e12, 40e9, 1555e9, 300e9),
    "a100": Gpu("NVIDIA A100 80 GB", 312e12, 80e9, 2039e9, 300e9),
    "h100": Gpu("NVIDIA H100 SXM", 989e12, 80e9, 3350e9, 450e9),
}
