"""What a run is made of, for its report and the model card."""

from __future__ import annotations

import dataclasses
import platform
from typing import TYPE_CHECKING, Any

import torch

import kiem
from kiem.parallel.distributed import Distributed

if TYPE_CHECKING:
    from kiem.training.run import Run


def run_metadata(run: Run, distributed: Distributed) -> dict[str, Any]:
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
            "device": distributed.name,
            "devices": distributed.world_size,
            "precision": distributed.precision,
            "compiled": run.compiled,
            "matrix_flops": distributed.matrix_flops,
        },
        "versions": {
            "kiem": kiem.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
