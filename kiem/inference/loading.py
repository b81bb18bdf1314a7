"""Opening a model directory for inference."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from kiem.data.tokenizer import Tokenizer
from kiem.model.files import find_model, read_model, read_model_tokenizer
from kiem.model.gemma3 import Gemma3


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to write.

    Attributes:
        model: in evaluation, on its device.
        tokenizer: its tokenizer.
        load_seconds: how long loading took.
    """

    model: Gemma3
    tokenizer: Tokenizer
    load_seconds: float


def load_for_inference(path: str, precision: Literal["auto", "fp32", "bf16"]) -> LoadedModel:
    """Loads a model directory, or downloads one when `path` is a Hub id and no folder.

    Args:
        path: the folder or Hub id.
        precision: "auto" takes bf16 on GPUs that have it; on CPUs, what the file has.

    Raises:
        UserError: it is not a Gemma 3 text model, or its tokenizer does not fit.
    """
    started = time.perf_counter()
    folder = find_model(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision)
    if precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported():
        dtype = torch.bfloat16
    model = read_model(folder, dtype=dtype, device=device).requires_grad_(False).eval()
    tokenizer = read_model_tokenizer(folder, model.config)
    return LoadedModel(model, tokenizer, time.perf_counter() - started)
