"""One update, however many processes compute it and however they share the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, run_script
from safetensors.torch import load_file

from kiem.core.errors import ExitCode
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3
from kiem.parallel.parallel_model import owners

# Several runs one after the other in the same processes, which take long to start.
SEVERAL_RUNS = """
import json, sys
from kiem.cli import run
from kiem.config import TrainingOptions
from training import main
for arguments in json.loads(sys.argv[1]):
    code = run(TrainingOptions, "training.py", main, arguments)
    assert code == 0, arguments
"""
# Joins the others after some seconds, and says what they add up to.
JOIN = """
import sys, time, torch
from kiem.parallel.distributed import init_distributed
time.sleep(float(sys.argv[1]))
with init_distributed("fp32") as devices:
    print(int(devices.all_reduce_sum(torch.tensor(devices.rank + 1))), flush=True)
    if "die" in sys.argv:
        sys.stdin.read()
"""
LEARNING_RATE = 2e-3
OPTIONS = ("--model", "gemma3-micro", "--precision", "fp32", "--learning-rate", f"{LEARNING_RATE}")
KINDS = {"adamw": ("--optimizer", "adamw"), "muon": ("--optimizer", "muon")}
# Muon multiplies in bf16, where noise of fp32 becomes larger.
MOST_DIFFERENCE = {"adamw": 1e-5, "muon": 1e-4}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PROCESSES = {"1-gpu": 1, "2-gpus": 2, "4-gpus": 4, "8-gpus": 8, "2-nodes": 16}
Train = Callable[[int, dict[str, tuple[str, ...]]], dict[str, Path]]


@pytest.fixture
def train(sample_chunks: Path, tmp_path: Path) -> Train:
    """Trains runs by name with so many processes; returns their directories."""
    program = tmp_path / "several_runs.py"
    program.write_text(SEVERAL_RUNS)

    def train(num_processes: int, runs: dict[str, tuple[str, ...]]) -> dict[str, Path]:
        common = (*OPTIONS, "--dataset-path", str(sample_chunks), "--output-dir", str(tmp_path))
        given = [
            (*common, "--run-name", name.replace(" ", "-"), *options)
            for name, options in runs.items()
        ]
        file = ROOT / "configs" / f"{num_processes}-gpus.yaml"
        launcher = ("-m", "accelerate.commands.launch", "--config_file", file)
        launcher = (*launcher, "--main_process_port=0")  # any free one
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = run_script(
            *(launcher if num_processes > 1 else ()), program, json.dumps(given), env=environment
        )
        assert done.returncode == 0, done.stderr
        return {name: tmp_path / name.replace(" ", "-") for name in runs}

    return train


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("test_loss")) for line in lines if "warning" not in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final_model" / "model.safetensors")


def cut(batch_size: int, accumulation: int, num_steps: int) -> tuple[str, ...]:
    sizes = ("--batch-size", f"{batch_size}", "--gradient-accumulation-steps", f"{accumulation}")
    steps = ("--max-steps", f"{num_steps}", "--eval-steps", "0", "--save-steps", "0")
    return (*sizes, *steps, "--minimal-pairs", "never")


@pytest.mark.slow
def test_an_update_is_the_same_however_it_is_cut(train: Train) -> None:
    adamw = KINDS["adamw"]
    alone = train(1, {"whole": (*cut(8, 1, 1), *adamw), "parts": (*cut(1, 8, 1), *adamw)})
    pair = train(2, {"pair": (*cut(4, 1, 1), *adamw), "pair-parts": (*cut(1, 4, 1), *adamw)})
    expected = torch.cat([value.flatten() for value in weights(alone["whole"]).values()])
    for name, run in {**alone, **pair}.items():
        found = torch.cat([value.flatten() for value in weights(run).values()])
        difference = (found - expected).abs()
        # The first update of AdamW is nearly the gradient's sign, which rounding decides where the
        # gradient is next to zero.
        assert (difference < 1e-6).float().mean() > 0.999, name
        assert difference.norm() < 1e-4 * len(expected) ** 0.5 * LEARNING_RATE, name


@pytest.mark.slow
def test_processes_and_shards_do_not_change_the_losses(train: Train) -> None:
    """The same chunks in the same order, and so the same losses and the same test loss."""
    alone = train(1, {kind: (*cut(4, 2, 4), *KINDS[kind]) for kind in KINDS})
    expected = {kind: losses(run) for kind, run in alone.items()}
    for num_processes, kinds in ((2, ("adamw", "muon")), (4, ("adamw",))):
        runs = {
            f"{kind} {shard} {num_processes}": (
                *(*cut(4 // num_processes, 2, 4), *KINDS[kind]),
                *("--shard", shard),
            )
            for kind in kinds
            for shard in ("none", "optimizer")
        }
        found = train(num_processes, runs)
        for name, run in found.items():
            kind = name.split()[0]
            assert losses(run) == pytest.approx(expected[kind], abs=MOST_DIFFERENCE[kind]), name
        for kind in kinds:
            plain, sharded = (
                weights(found[f"{kind} {shard} {num_processes}"]) for shard in ("none", "optimizer")
            )
            for parameter, value in plain.items():
                assert torch.equal(sharded[parameter], value), parameter


@pytest.mark.slow
def test_sharded_runs_go_on_with_other_numbers_of_processes(train: Train) -> None:
    """From two processes to one and back to two: the losses of an undisturbed run."""
    saving = ("--save-steps", "2", "--save-total-limit", "3", "--optimizer", "adamw")

    def resume(name: str, run: Path, step: int, *options: str) -> dict[str, tuple[str, ...]]:
        return {name: (*options, *saving, "--resume", str(run / "checkpoints" / f"step-{step}"))}

    sharded = (*cut(2, 2, 6), "--shard", "optimizer")
    whole = train(2, {"whole": (*sharded, *saving)})["whole"]
    alone = train(1, resume("alone", whole, 2, *cut(4, 2, 6)))["alone"]
    pair = train(2, resume("pair", alone, 4, *sharded))["pair"]
    assert losses(alone) == pytest.approx(losses(whole)[2:], abs=1e-5)
    assert losses(pair) == pytest.approx(losses(whole)[4:], abs=1e-5)


def test_owners_hold_about_as_much() -> None:
    model = Gemma3(preset("gemma3-micro", 2048))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for world_size in (2, 4):
        found = owners(model, world_size)
        assert found.keys() == sizes.keys()
        held = [
            sum(sizes[name] for name, owner in found.items() if owner == rank)
            for rank in range(world_size)
        ]
        assert max(held) - min(held) < 0.01 * sum(sizes.values())


def test_sharding_alone_is_refused(sample_chunks: Path, tmp_path: Path) -> None:
    done = run_script(
        *("training.py", "--dataset-path", sample_chunks, "--output-dir", tmp_path, *OPTIONS),
        *("--shard", "optimizer"),
    )
    assert done.returncode == ExitCode.NO_EFFECT
    assert "--shard: has no effect with one device" in done.stderr


def test_accelerate_reads_our_files() -> None:
    assert {path.stem for path in CONFIGS} == PROCESSES.keys()
    for path in CONFIGS:
        config = load_config_from_file(str(path))
        assert config.num_processes == PROCESSES[path.stem]
        assert config.mixed_precision == "bf16"
        parser = launch_command_parser()
        given = parser.parse_args(["--config_file", str(path), "training.py"])
        launched = _validate_launch_command(given)[0]
        assert launched.num_processes == PROCESSES[path.stem]
        assert launched.multi_gpu == (launched.num_processes > 1)


def test_accelerate_plugins_are_refused_by_name(sample_chunks: Path, tmp_path: Path) -> None:
    done = run_script(
        *("training.py", "--dataset-path", sample_chunks, "--output-dir", tmp_path, *OPTIONS),
        env={"ACCELERATE_USE_FSDP": "true"},
    )
    assert done.returncode == ExitCode.BAD_OPTION
    assert "accelerate config: FSDP is not used by kiem" in done.stderr


@pytest.mark.slow
def test_processes_started_again_do_not_meet_the_dead() -> None:
    """Launchers keep their store over a restart, and what the dead have left in it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
    }

    def start(rank: int, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", JOIN, *words],
            env={**environment, "RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    first = [start(rank, "0", "die") for rank in (0, 1)]
    for process in first:
        assert process.stdout is not None
        assert process.stdout.readline() == "3\n"
        process.kill()
        process.communicate()
    # Either may come later than the other, and find the other's new address or its old one.
    for late in (0, 1):
        again = [start(rank, "3" if rank == late else "0") for rank in (0, 1)]
        assert [process.communicate(timeout=60)[0] for process in again] == ["3\n", "3\n"]
