"""What a plan says before a training, and what happens when memory does not suffice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script

from kiem.core.errors import ExitCode
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3
from kiem.optim.optimizer import make_optimizers
from kiem.parallel.parallel_model import Shard
from kiem.planning.memory_estimate import Setting, dry_run, estimate_memory
from kiem.planning.time_estimate import GPUS, calculate_step_seconds, flops_per_token

MICRO = preset("gemma3-micro", 1024)
SETTING = Setting(
    device_type="cpu",
    config=MICRO,
    chunk_size=64,
    batch_size=2,
    bf16=False,
    recompute="none",
    document_mask=True,
    optimizer="adamw",
    world_size=1,
    shard="none",
)
# Leaves the training only so much memory beyond what the program has when it starts.
SHORT_OF_MEMORY = """
import resource, sys
from kiem.cli import run
from kiem.config import TrainingOptions
import kiem.training.loop
import torch._dynamo  # as optimizers do, and an import cannot do without memory
from training import main
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = held + int(sys.argv[1]) * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(run(TrainingOptions, "training.py", main, sys.argv[2:]))
"""


@pytest.mark.parametrize("shard", ["none", "parameters"])
def test_dry_run_counts_what_autograd_keeps(shard: Shard) -> None:
    """The bytes that live between forward and backward, against autograd's own saved tensors."""
    torch.manual_seed(0)
    model = Gemma3(MICRO)
    model.model.embed_tokens.adds_to_gradient = shard == "none"
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(3, 1024, (2, 64))
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = model(ids, ids, torch.tensor([0, 64, 128], dtype=torch.int32), 1e-5)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    expected = sum(size for pointer, size in saved.items() if pointer not in weights)
    found = dry_run(replace(SETTING, shard=shard))
    held = 2 * 4 * MICRO.num_parameters()
    assert found.kept_bytes - held == pytest.approx(expected, rel=0.03)
    assert found.peak_bytes > found.kept_bytes
    assert loss.isfinite()


def test_a_block_of_the_loss_is_counted() -> None:
    """A GPU has logits in fp32, their gradient and a copy of the embedding in bf16, for N rows."""
    large = preset("gemma3-micro", 262_144)
    one = replace(SETTING, config=large, device_type="cuda", bf16=True, recompute="full")
    held = 2 * 4 * large.num_parameters()
    for num_rows in (1024, 2048, 8192):  # a block has 2048 at most
        found = dry_run(replace(one, batch_size=num_rows // 1024, chunk_size=1024))
        expected = held + (4 + 2) * min(num_rows, 2048) * 262_144 + 2 * 262_144 * large.hidden_size
        assert expected < found.peak_bytes < 1.1 * expected


def test_less_is_kept_when_more_is_computed_again() -> None:
    kept = [
        dry_run(replace(SETTING, recompute=recompute)).kept_bytes  # type: ignore[arg-type]
        for recompute in ("none", "selective", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_are_as_large_as_the_optimizers_make_them(kind: str) -> None:
    model = Gemma3(MICRO)
    optimizers = make_optimizers(model, kind, 0.1)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    states = [values for optimizer in optimizers for values in optimizer.state.values()]
    expected = sum(
        value.nbytes for values in states for value in values.values() if value.numel() > 1
    )
    setting = replace(SETTING, optimizer=kind)  # type: ignore[arg-type]
    assert estimate_memory(setting).optimizer == expected
    shares = replace(setting, world_size=4, shard="optimizer")
    assert expected / 4 <= estimate_memory(shares).optimizer < expected / 4 * 1.35


def test_shared_parameters_take_a_share_and_what_is_gathered() -> None:
    setting = replace(SETTING, config=preset("gemma3-1b", 262_144), recompute="full")
    alone = estimate_memory(setting)
    eight = estimate_memory(replace(setting, world_size=8, shard="parameters"))
    embedding = 4 * 262_144 * 1152
    layers = 2 * (alone.weights - embedding) / 26
    assert eight.weights == pytest.approx(alone.weights / 8 + embedding + layers)
    assert eight.gradients == pytest.approx(alone.weights / 8 + layers)
    assert eight.optimizer == alone.optimizer / 8
    assert eight.activations == alone.activations


def test_calculated_time_follows_published_figures() -> None:
    """By hand: 45 % of an A10G's 70 TFLOP/s, a third more work when all layers are recomputed."""
    config = preset("gemma3-1b", 262_144)
    setting = replace(SETTING, config=config, chunk_size=1024, batch_size=1, recompute="full")
    expected = 1024 * flops_per_token(config, 1024) * 4 / 3 / (0.45 * 70e12)
    assert calculate_step_seconds(setting, 2, GPUS["a10g"]) == pytest.approx(2 * expected)
    four = replace(setting, world_size=4)
    once = 3 / 4 * 4 * config.num_parameters() / 12e9
    for shard, accumulation, exchanges in (
        ("none", 2, 2),
        ("optimizer", 2, 3),
        ("parameters", 1, 3),
        ("parameters", 2, 6),
    ):
        shared = replace(four, shard=shard)  # type: ignore[arg-type]
        seconds = calculate_step_seconds(shared, accumulation, GPUS["a10g"])
        assert seconds == pytest.approx(accumulation * expected + exchanges * once)


def test_plan_is_printed_and_nothing_is_made(sample_chunks: Path, tmp_path: Path) -> None:
    given = ("training.py", "--dataset-path", sample_chunks, "--output-dir", tmp_path / "runs")
    done = run_script(
        *(*given, "--model", "gemma3-micro", "--plan", "--gpu", "a10g", "--num-gpus", "4"),
        *("--price", "5.67"),
    )
    assert done.returncode == 0, done.stderr
    for text in ("4 x NVIDIA A10G", "calculated", "weights", "fit into", "tokens per second"):
        assert text in done.stdout, text
    assert "cost" in done.stdout
    assert not (tmp_path / "runs").exists()
    for without_effect in (("--gpu", "a10g"), ("--plan", "--shard", "optimizer")):
        done = run_script(*given, *without_effect)
        assert done.returncode == ExitCode.NO_EFFECT


@pytest.mark.slow
def test_passes_become_smaller_when_memory_is_short(sample_chunks: Path, tmp_path: Path) -> None:
    """A true limit of the system; the losses are those of small passes from the start."""
    program = tmp_path / "short_of_memory.py"
    program.write_text(SHORT_OF_MEMORY)
    common = ("--dataset-path", sample_chunks, "--output-dir", tmp_path, "--model", "gemma3-micro")
    common = (*common, "--precision", "fp32", "--eval-steps", "0", "--save-steps", "0")
    common = (*common, "--minimal-pairs", "never", "--max-steps", "2")
    # What Muon's products in bf16 take beside their tensors, no trial can tell.
    common = (*common, "--optimizer", "adamw")
    cut = ("--batch-size", "128", "--gradient-accumulation-steps", "1")
    # Threads would take address space.
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(ROOT)
    short = run_script(program, "850", *common, *cut, "--run-name", "short", env=environment)
    # Only the updates count: what writes the model starts threads, for whose stacks a limit of
    # addresses leaves no room.
    assert "out of memory: going on with --batch-size" in short.stdout, short.stderr
    run = json.loads((tmp_path / "short" / "run.json").read_text())["recipe"]
    assert run["batch_size"] < 128
    assert run["batch_size"] * run["accumulation"] == 128
    cut = ("--batch-size", f"{run['batch_size']}")
    cut = (*cut, "--gradient-accumulation-steps", f"{run['accumulation']}")
    plain = run_script("training.py", *common, *cut, "--run-name", "plain", env=environment)
    assert plain.returncode == 0, plain.stderr

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    assert len(losses("short")) == 2
    assert losses("short") == losses("plain")
