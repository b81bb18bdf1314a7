"""What a run is made of, for its report and the model card."""

from __future__ import annotations

import dataclasses
import platform
from typing import TYPE_CHECKING, Any

import torch

import kiem
from kiem.training.devices import Devices

if TYPE_CHECKING:
    from kiem.training.run import Run


def facts_of(run: Run, devices: Devices) -> dict[str, Any]:
    """Returns what a run is made of: all of its summary that is known before it starts."""
    train, test = (run.manifest["splits"][split] for split in ("train", "test"))
    return {
        "model": run.model_name,
        "parameters": run.model.config.num_parameters(),
        "initialized_from": run.options.init_from or "random weights",
        "data": {
            "source": run.manifest["source"],
            "options": run.manifest["options"],
            "manifest_sha256": run.fingerprint["data"],
            "train_tokens": train["tokens"],
            "train_documents": train["documents"],
            "test_documents": test["documents"],
            "bytes_per_source": train["bytes_per_source"],
        },
        "tokenizer": run.manifest["tokenizer"],
        "recipe": dataclasses.asdict(run.recipe),
        "hardware": {
            "device": devices.name,
            "devices": devices.world_size,
            "precision": devices.precision,
            "compiled": run.compiled,
            "matrix_flops": devices.matrix_flops,
        },
        "versions": {
            "kiem": kiem.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
