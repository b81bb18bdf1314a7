"""Which kind of device a tensor computes on."""

from __future__ import annotations

from torch import Tensor


def device_type(tensor: Tensor) -> str:
    """Returns "cpu" or "cuda".

    A fake tensor is on the CPU, since a torch without CUDA knows no gradients of fake CUDA tensors.
    Its mode says which device it stands for (planning/memory_estimate.py).
    """
    mode = getattr(tensor, "fake_mode", None)
    return getattr(mode, "stands_for", tensor.device.type)
