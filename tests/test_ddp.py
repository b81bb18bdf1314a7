"""Several processes with whole models: their gradients are one, and in memory once."""

from __future__ import annotations

import copy
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from kiem.compute.memory import give_back_free_memory
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel

NUM_PASSES = 3


def taken_bytes(device: torch.device) -> int:
    """Returns what tensors take on a GPU, or what is resident of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    give_back_free_memory()
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def _train(rank: int, folder: str, device_type: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    device = torch.device(device_type)
    distributed = Distributed(rank, 2, device, "fp32", 1e9)
    model = Gemma3(preset("gemma3-nano", 16_384))
    initialize(model, 1)
    model.to(device).model.embed_tokens.adds_to_gradient = True
    alone = copy.deepcopy(model)
    ids = torch.randint(3, 16_384, (2, NUM_PASSES, 1, 16), generator=torch.Generator()).to(device)
    for batch in ids.flatten(0, 1):
        alone(batch, batch, None, scale=1 / ids.numel())[0].backward()
    DistributedDataParallel(
        torch.nn.Linear(2, 2, device=device)
    )  # what it imports counts as memory

    before = taken_bytes(device)
    parallel_model = ParallelModel(model, distributed, "none")
    for _ in range(3):  # DDP arranges gradients anew after the first update
        for index, batch in enumerate(ids[rank]):
            with nullcontext() if index == NUM_PASSES - 1 else parallel_model.no_sync():
                parallel_model(batch, batch, None, 0.0, 2 / ids.numel())[0].backward()
            taken = taken_bytes(device) - before
            assert taken < 1.4 * 4 * model.config.num_parameters()
        for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-5)
        parallel_model.zero_grad()
    distributed.barrier()
    os._exit(0)  # as kiem.parallel.launch.leave


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is resident")
def test_gradients_are_summed_and_held_once(tmp_path: Path) -> None:
    """In three updates of three passes, of which two do not send; beside no other large tensors."""
    spawn(_train, (str(tmp_path), "cpu"), nprocs=2)


@pytest.mark.gpu
def test_gradients_are_held_once_on_a_gpu(tmp_path: Path) -> None:
    """Of two processes that share it, as with KIEM_SHARE_GPUS."""
    spawn(_train, (str(tmp_path), "cuda"), nprocs=2)
