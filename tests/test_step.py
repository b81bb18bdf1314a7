"""An update queues all its work before the host waits for a figure, however many passes it has."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kiem.config import TrainingOptions
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.optim.batch import Collator
from kiem.optim.optimizer import make_optimizers
from kiem.optim.step import Verdict, train_step
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel

CHUNKS = np.random.default_rng(0).integers(2, 300, (4, 2, 64), dtype=np.int32)  # passes, B, T
UPDATE = Verdict("update")


class Calls(TorchDispatchMode):
    """Counts the operations within it by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Training:
    """Some updates of a small model, with Muon for its matrices."""

    def __init__(self, device: torch.device, precision: Any):
        self.distributed = Distributed(0, 1, device, precision, 1e9)
        model = Gemma3(preset("gemma3-micro", 300))
        initialize(model, 0)
        model.model.embed_tokens.adds_to_gradient = True
        self.model = ParallelModel(model.to(device), self.distributed, "none")
        dtype = self.distributed.matrix_dtype
        self.optimizers = make_optimizers(model, "muon", 0.1, matrix_dtype=dtype)
        collate = Collator(2, 0, document_mask=True, device=device)
        self.batches = [collate(chunks) for chunks in CHUNKS]

    def update(self, num_passes: int) -> float:
        options = TrainingOptions((Path("unused"),))
        batches = self.batches[:num_passes]
        judge = lambda *_: UPDATE  # noqa: E731
        arguments = (self.model, self.optimizers, batches, self.distributed, options, 1e-3, judge)
        return train_step(*arguments).loss


def test_no_pass_asks_for_a_value() -> None:
    training = Training(torch.device("cpu"), "fp32")
    first = training.update(1)
    with Calls() as calls:
        last = training.update(len(CHUNKS))
    assert last < first
    assert calls.counts["aten.mm.default"] > 0
    for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique"):
        assert calls.counts[f"aten.{name}.default"] == 0, name


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_the_host_waits_once_in_an_update() -> None:
    training = Training(torch.device("cuda", 0), "bf16")
    training.update(len(CHUNKS))  # libraries wait when they are first used
    for num_passes in (1, len(CHUNKS)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            training.update(num_passes)
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
        assert len(waits) == 1, waits
