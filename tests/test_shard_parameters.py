"""`--shard parameters`: the training of one process, though each of several holds only a share."""

from __future__ import annotations

import copy
import gc
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lives import Lives, outcome
from safetensors.torch import load_file
from torch.multiprocessing import spawn
from transformers import Gemma3ForCausalLM

from kiem.core.errors import ExitCode
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.optim.optimizer import is_hidden_matrix, make_optimizers
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import (
    ParallelModel,
    copy_full_tensor,
    full_model,
    full_tensor,
    shard_parameters,
)

SHARED = ("--shard", "parameters")
# With a higher rate the differences of rounding grow faster.
OPTIONS = (
    *("--optimizer", "adamw", "--max-steps", "6", "--save-steps", "2", "--eval-steps", "3"),
    *("--learning-rate", "4e-3"),
)


def losses(run: Path) -> list[float]:
    return [line.get("loss", line.get("test_loss")) for line in outcome(run)["metrics"]]


def passes(processes: int) -> tuple[str, ...]:
    """Options that give an update the same four chunks, in two passes of each process."""
    sizes = ("--batch-size", str(2 // processes), "--gradient-accumulation-steps", "2")
    return (*OPTIONS, *sizes)


def test_an_interrupted_run_is_that_of_one_process(lives: Lives, tmp_path: Path) -> None:
    """From two processes to one and back: losses, test losses, and a model that others load."""
    assert lives.run(tmp_path / "whole", *passes(1)) == [0], lives.log.read_text()
    for step, processes in ((2, 2), (4, 1), (6, 2)):
        options = (*passes(processes), *(SHARED if processes > 1 else ()))
        if step < 6:
            codes = lives.run_until(step, tmp_path / "cut", *options, processes=processes)
        else:
            codes = lives.run(tmp_path / "cut", *options, processes=processes)
        assert set(codes) <= {0, int(ExitCode.STOPPED)}, lives.log.read_text()
    runs = [tmp_path / name / "run" for name in ("whole", "cut")]
    expected, found = map(losses, runs)
    assert len(found) == 6 + 2  # and two evaluations
    assert found == pytest.approx(expected, abs=1e-5)
    expected_weights, found_weights = (
        load_file(run / "final_model" / "model.safetensors") for run in runs
    )
    differences = [
        (found_weights[name] - weight).abs() for name, weight in expected_weights.items()
    ]
    # Where the gradient is next to zero, its rounding decides the direction of AdamW's update.
    assert (torch.cat([d.flatten() for d in differences]) < 1e-5).float().mean() > 0.9999
    assert max(float(difference.max()) for difference in differences) < 1e-3
    model = Gemma3ForCausalLM.from_pretrained(runs[1] / "final_model", dtype=torch.float32)
    assert torch.equal(model.model.embed_tokens.weight, found_weights["model.embed_tokens.weight"])


def held_bytes() -> int:
    """Returns the bytes of all tensors in this process, those without owners collected."""
    gc.collect()
    tensors = (
        value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)
    )
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _train_and_measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    distributed = Distributed(rank, 2, torch.device("cpu"), "fp32", 1e9)
    model = Gemma3(preset("gemma3-micro", 1003))  # odd: shares of different sizes
    initialize(model, 1)
    alone = copy.deepcopy(model)
    num_values = model.config.num_parameters()
    before = held_bytes() - 4 * num_values
    shard_parameters(model, distributed)
    assert held_bytes() - before < 4 * num_values * 0.51
    parallel_model = ParallelModel(model, distributed, "parameters")
    optimizers = make_optimizers(model, "adamw", 0.1, parallel_model.local_params)
    assert held_bytes() - before < 3 * 4 * num_values * 0.51
    ids = torch.randint(3, 1003, (4, 32), generator=torch.Generator().manual_seed(0))
    for index in range(2):
        with nullcontext() if index == 1 else parallel_model.no_sync():
            batch = ids[2 * rank + index][None]
            (parallel_model(batch, batch, None)[0] * 2 / ids.numel()).backward()
        assert held_bytes() - before < 4 * 4 * num_values * 0.51
    (alone(ids, ids, None)[0] / ids.numel()).backward()
    for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert found.grad is not None
        torch.testing.assert_close(full_tensor(found.grad), expected.grad, atol=1e-6, rtol=1e-5)
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
    assert float(parallel_model.clip_grad_norm(0.5)) == pytest.approx(float(norm), rel=1e-5)
    for optimizer in optimizers:
        optimizer.step()
    parallel_model.zero_grad()
    alone.zero_grad()
    assert held_bytes() - before < 3 * 4 * num_values * 0.51

    whole = full_model(model, torch.device("cpu"))
    assert type(whole) is Gemma3
    if rank == 0:  # by itself: nobody waits for the other
        assert whole(ids, ids, None)[0].isfinite()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), alone.parameters(), strict=True):
            copy_full_tensor(parameter, value)
            assert torch.equal(full_tensor(parameter), value)
    distributed.barrier()
    os._exit(0)  # as kiem.parallel.launch.leave


def test_each_process_holds_its_share(tmp_path: Path) -> None:
    """Of weights, gradients and moments: counted in the processes, after each part of an update."""
    spawn(_train_and_measure, (str(tmp_path),), nprocs=2)


def _compare_in_bf16(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    distributed = Distributed(rank, 2, torch.device("cpu"), "bf16", 1e9)
    model = Gemma3(preset("gemma3-micro", 301))
    initialize(model, 1)
    alone = copy.deepcopy(model)
    shard_parameters(model, distributed)
    dtypes, hidden_dtypes = set(), set()
    product = model.model.layers[1].mlp.up_proj
    product.register_forward_pre_hook(lambda module, _: dtypes.add(module.weight.dtype))
    model.model.norm.register_forward_pre_hook(lambda _, args: hidden_dtypes.add(args[0].dtype))
    ids = torch.randint(3, 301, (2, 32), generator=torch.Generator().manual_seed(0))
    for trained in (model, alone):
        with distributed.autocast():
            loss, _ = trained(ids, ids, None, scale=1 / ids.numel())
        loss.backward()
    assert (dtypes, hidden_dtypes) == ({torch.bfloat16}, {torch.float32})
    for (name, expected), found in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None
        gradient = full_tensor(found.grad)
        assert gradient.dtype == torch.float32
        assert (gradient - expected.grad).norm() < 0.01 * expected.grad.norm(), name
    distributed.barrier()
    os._exit(0)


def test_layers_are_sent_in_bf16(tmp_path: Path) -> None:
    """With gradients that are those of one process, which rounds weights in its products."""
    spawn(_compare_in_bf16, (str(tmp_path),), nprocs=2)


@pytest.mark.slow
def test_compiled_and_recomputed_layers_give_the_same(lives: Lives, tmp_path: Path) -> None:
    options = (*passes(2), *SHARED, "--max-steps", "3", "--save-steps", "3")
    for recompute, compiled in (("full", "never"), ("selective", "always")):
        how = ("--activation-checkpointing", recompute, "--compile", compiled)
        codes = lives.run(tmp_path / recompute, *options, *how, processes=2)
        assert codes == [0, 0], lives.log.read_text()
    assert "compiled the layers in" in lives.log.read_text()
    expected, found = (losses(tmp_path / name / "run") for name in ("full", "selective"))
    assert found == pytest.approx(expected, abs=1e-5)


def _update_by_muon(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=3)
    distributed = Distributed(rank, 3, torch.device("cpu"), "fp32", 1e9)
    # Neither rows nor matrices of a shape can be divided by three.
    model = Gemma3(replace(preset("gemma3-micro", 301), num_hidden_layers=2))
    initialize(model, 1)
    alone = copy.deepcopy(model)
    shard_parameters(model, distributed)
    for trained in (model, alone):
        optimizers = make_optimizers(trained, "muon", 0.1)
        for step in range(3):
            ids = torch.randint(3, 301, (2, 32), generator=torch.Generator().manual_seed(step))
            trained(ids, ids, None, scale=1 / ids.numel())[0].backward()
            for optimizer in optimizers:
                optimizer.step()
            trained.zero_grad()
    for (name, expected), found in zip(alone.named_parameters(), model.parameters(), strict=True):
        value = full_tensor(found)
        if is_hidden_matrix(name, expected):
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    distributed.barrier()
    os._exit(0)


def test_muon_updates_as_in_one_process(tmp_path: Path) -> None:
    spawn(_update_by_muon, (str(tmp_path),), nprocs=3)
