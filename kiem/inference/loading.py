"""Loading of a model directory for inference."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from kiem.compute.speed import check_bf16, prefers_bf16
from kiem.core.errors import bad_option
from kiem.inference.decoder import use_kernels
from kiem.model.gemma3 import Gemma3
from kiem.model.io import find_model, read_model, read_model_tokenizer
from kiem.parallel.launch import choose_device
from kiem.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        load_seconds: how long loading took.
        warning: why it decodes more slowly than it could, if so.
    """

    model: Gemma3
    tokenizer: Tokenizer
    load_seconds: float
    warning: str | None = None


def load_for_inference(
    path: str,
    precision: Literal["auto", "fp32", "bf16"],
    quantize: Literal["none", "int8", "int4"] | None = None,
) -> LoadedModel:
    """Loads a model directory, or downloads one when `path` is a Hub id and no folder.

    Args:
        path: the folder or Hub id.
        precision: "auto" is fp32 where bf16 is slow; elsewhere bf16 on GPUs and for quantized
            weights, and as in the file for others.
        quantize: the form of the weights for the engine; None: as in the plain model, which
            decodes more slowly.

    Raises:
        UserError: it is not a Gemma 3 text model, its tokenizer does not fit, it cannot be
            quantized here, the GPU has no bf16, or there are fewer GPUs than processes.
    """
    started = time.perf_counter()
    folder = find_model(path)
    device = choose_device()
    on_gpu = device.type == "cuda"
    is_quantized = quantize in ("int8", "int4")
    if is_quantized and on_gpu:
        what = "weights are quantized on CPUs only, and here is a GPU"
        raise bad_option(f"--quantize {quantize}", what, "Leave it out.")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision)
    if precision == "bf16":
        check_bf16(device)
    if precision == "auto":
        if not prefers_bf16(device):
            dtype = torch.float32
        elif is_quantized or on_gpu:
            dtype = torch.bfloat16
    has_kernels = quantize is not None and not on_gpu
    # Kernels for activations in fp32 read weights as they are stored.
    stored = None if has_kernels and dtype == torch.float32 else dtype
    model = read_model(folder, dtype=stored, device=device).requires_grad_(False).eval()
    warning = None
    if quantize is not None and has_kernels:
        reason = use_kernels(model, quantize, dtype)
        if reason is not None and is_quantized:
            raise bad_option(f"--quantize {quantize}", f"{folder}: {reason}", "Leave it out.")
        if reason is not None:
            model.to(dtype)
            warning = f"The fast matrix products are not used: {reason}."
    tokenizer = read_model_tokenizer(folder, model.config)
    return LoadedModel(model, tokenizer, time.perf_counter() - started, warning)
