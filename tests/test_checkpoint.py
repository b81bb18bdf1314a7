"""Checkpoints: whole or refused, the right one found, whoever wrote it and whoever reads it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import run_script
from lives import SCALE, Lives, chaos, outcome
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.multiprocessing import spawn

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import sha256_file
from kiem.data.prepare.verify import verify_directory
from kiem.inference.loading import load_for_inference
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3
from kiem.model.io import write_weights
from kiem.optim.optimizer import make_optimizers
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import owners
from kiem.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    prune_checkpoints,
    save_checkpoint,
    set_aside_after,
    verify_checkpoint,
)

TINY = Gemma3Config(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=8,
    sliding_window_pattern=2,
)
IDS = {"pad": 0, "eos": 1, "bos": 2}
QUIET = Console(quiet=True)


def distributed(rank: int = 0, world_size: int = 1) -> Distributed:
    return Distributed(rank, world_size, torch.device("cpu"), "fp32", 1e9)


def made(kind: str = "adamw", num_updates: int = 1) -> tuple[Gemma3, list[torch.optim.Optimizer]]:
    """A model and its optimizers after some updates."""
    torch.manual_seed(1)
    model = Gemma3(TINY)
    optimizers = make_optimizers(model, kind, 0.1)  # type: ignore[arg-type]
    for _ in range(num_updates):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def save(folder: Path, step: int, test_loss: float | None = None, **how: object) -> Path:
    model, optimizers = made(**how)  # type: ignore[arg-type]
    state = {"step": step, "run": {"test_loss": test_loss}}
    return save_checkpoint(folder, model, optimizers, IDS, state, distributed())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_weights_are_written_as_the_library_writes_them(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6).reshape(2, 3).T.to(dtype),
        "a": torch.tensor(3).to(dtype),
        "größe": torch.zeros(0, 4, dtype=dtype),
        "c": torch.ones(3, dtype=torch.uint8),
        "large": torch.arange(10_000_000).reshape(1000, -1).to(dtype),  # several blocks of int64
    }
    sha256 = write_weights(tensors, tmp_path / "own")
    assert sha256 == sha256_file(tmp_path / "own")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "library")
    own, library = load_file(tmp_path / "own"), load_file(tmp_path / "library")
    assert own.keys() == library.keys()
    for name, tensor in library.items():
        assert torch.equal(own[name], tensor)
        assert own[name].dtype == tensor.dtype


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_everything_comes_back(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path, 3, kind=kind, num_updates=3)
    model, optimizers = made(kind=kind, num_updates=1)
    before = torch.get_rng_state()
    torch.rand(5)
    load_checkpoint(path, model, optimizers, distributed())
    assert torch.equal(torch.get_rng_state(), load_file(next(path.glob("random-*")))["cpu"])
    torch.set_rng_state(before)
    expected_model, expected_optimizers = made(kind=kind, num_updates=3)
    for name, parameter in expected_model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    for optimizer, expected in zip(optimizers, expected_optimizers, strict=True):
        found, wanted = optimizer.state_dict()["state"], expected.state_dict()["state"]
        assert found.keys() == wanted.keys()
        for index, moments in wanted.items():
            assert moments.keys() == found[index].keys()
            assert all(torch.equal(found[index][key], value) for key, value in moments.items())


def _save_sharded(rank: int, folder: str) -> None:
    """One of two processes, each of which holds the moments of its own parameters."""
    meeting = f"file://{folder}-meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    model, optimizers = made(num_updates=2)
    dealt = owners(model, 2)
    for name, parameter in model.named_parameters():
        if dealt[name] != rank:
            del optimizers[0].state[parameter]
    state = {"step": 2, "run": {"test_loss": None}}
    save_checkpoint(Path(folder), model, optimizers, IDS, state, distributed(rank, 2))
    torch.distributed.barrier()
    os._exit(0)  # as kiem.parallel.launch.leave


def test_moments_of_sharded_optimizers_are_put_together(tmp_path: Path) -> None:
    """As of optimizers that each hold a part of the parameters: what one reads is the whole."""
    spawn(_save_sharded, (str(tmp_path / "made"),), nprocs=2)
    path = newest_valid(tmp_path / "made", QUIET)
    assert path is not None
    parts = [load_file(file) for file in sorted(path.glob("optimizer-*"))]
    assert len(parts) == 2
    assert not parts[0].keys() & parts[1].keys()
    model, optimizers = made(num_updates=1)
    load_checkpoint(path, model, optimizers, distributed())
    expected, found = made(num_updates=2)[1][0], optimizers[0]
    for index, moments in expected.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(found.state_dict()["state"][index][key], value)


def test_the_newest_whole_one_is_found_and_the_damaged_one_named(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (1, 2, 10)]
    assert newest_valid(tmp_path, QUIET) == paths[2]
    file = paths[2] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (paths[1] / "manifest.json").unlink()
    console = Console(record=True, width=1000)
    assert newest_valid(tmp_path, console) == paths[0]
    said = console.export_text()
    assert f"{file}: damaged: " in said
    assert f"{paths[1] / 'manifest.json'}: damaged: it cannot be read" in said
    set_aside_after(tmp_path, 1)
    assert names(tmp_path) == ["aside-step-10", "aside-step-2", "step-1"]
    (paths[0] / "state.json").write_text("{}")
    with pytest.raises(UserError, match="none of the checkpoints is intact"):
        newest_valid(tmp_path, QUIET)
    save(tmp_path, 2)
    prune_checkpoints(tmp_path, 2)  # they are gone when a new one is there
    assert names(tmp_path) == ["step-1", "step-2"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {1: None, 2: 3.0, 3: 2.5, 4: 2.5, 5: 2.7, 6: 2.9}
    for step, loss in losses.items():
        save(tmp_path, step, test_loss=loss)
        prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["step-3", "step-5", "step-6"]


def places(path: Path, chance: random.Random, num: int) -> Iterator[tuple[Path, bytes]]:
    """Yields files of a folder with what damage makes of them: flipped bits, or the end cut off."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "README.md")
    for number in range(num):
        file = files[number % len(files)]
        data = bytearray(file.read_bytes())
        if number // len(files) % 6 == 5 or len(data) == 0:
            yield file, bytes(data[: chance.randrange(len(data))])
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            yield file, bytes(data)


def damage(path: Path, check: Callable[[], object], chance: random.Random, num: int) -> None:
    check()
    for file, damaged in places(path, chance, num):
        whole = file.read_bytes()
        file.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            check()
        assert file.name in f"{caught.value.where} {caught.value.what}"
        file.write_bytes(whole)
    check()


def test_damage_to_a_checkpoint_is_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    damage(path, lambda: verify_checkpoint(path), chaos("checkpoint"), round(400 * SCALE))


def test_damage_to_a_final_model_is_detected(trained_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "final_model"
    shutil.copytree(trained_run / "final_model", path)
    check = lambda: load_for_inference(str(path), "auto")  # noqa: E731
    damage(path, check, chaos("model"), round(400 * SCALE))


def test_damage_to_a_chunk_directory_is_detected(sample_chunks: Path, tmp_path: Path) -> None:
    path = tmp_path / "chunks"
    shutil.copytree(sample_chunks, path)
    damage(path, lambda: verify_directory(path), chaos("chunks"), round(400 * SCALE))


def test_another_run_is_refused_and_a_change_is_told(
    sample_chunks: Path, trained_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained_run, tmp_path / "short")
    shutil.rmtree(tmp_path / "short" / "final_model")
    common = ("training.py", "--dataset-path", sample_chunks, "--model", "gemma3-micro")
    common += ("--output-dir", tmp_path, "--run-name", "short", "--batch-size", "4")
    common += ("--gradient-accumulation-steps", "2", "--eval-steps", "6", "--save-steps", "4")
    done = run_script(*common, "--max-steps", "12", "--optimizer", "adamw", "--seed", "1")
    assert done.returncode == ExitCode.ALREADY_EXISTS
    assert "seed was 42, is 1; optimizer was 'muon', is 'adamw'" in done.stderr
    file = tmp_path / "short" / "checkpoints" / "step-12" / "state.json"
    file.write_text(file.read_text().replace("12", "13", 1))
    done = run_script(*common, "--max-steps", "14")
    assert done.returncode == 0, done.stderr
    assert f"{file}: damaged: " in done.stdout
    assert "max_steps was 12, is 14 from here on" in done.stdout
    assert "step-8, after step 8" in done.stdout
    assert names(tmp_path / "short" / "checkpoints") == ["step-12", "step-14"]


def test_processes_may_change_from_two_to_one_to_two(sample_chunks: Path, tmp_path: Path) -> None:
    """The updates are the same but for the order of sums, and so is the result but for rounding."""
    lives = Lives(sample_chunks, tmp_path)
    (tmp_path / "a").mkdir()
    try:
        assert lives.run(tmp_path / "b", processes=2) == [0, 0], lives.log.read_text()
        for step, processes in ((4, 2), (8, 1), (12, 2)):
            options = ("--save-steps", "4", "--gradient-accumulation-steps", str(2 // processes))
            if step < 12:
                codes = lives.run_until(step, tmp_path / "a", *options, processes=processes)
            else:
                codes = lives.run(tmp_path / "a", *options, processes=processes)
            assert set(codes) == {0 if step == 12 else int(ExitCode.STOPPED)}, codes
    finally:
        lives.close()
    changed, whole = outcome(tmp_path / "a" / "run"), outcome(tmp_path / "b" / "run")
    losses = [[m["loss"] for m in run["metrics"] if "loss" in m] for run in (changed, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(losses[0]) == 12


def test_a_manifest_says_which_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {*names(path)} - {"manifest.json"}
    with pytest.raises(UserError, match="no such checkpoint"):
        verify_checkpoint(tmp_path / "step-2")
    assert list_checkpoints(tmp_path) == [path]
