"""What makes training fast: precision by measurement, compiled layers; and that nothing drifts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import run_script
from rich.console import Console

from kiem.compute.speed import prefers_bf16
from kiem.config import TrainingOptions
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3
from kiem.parallel.distributed import Distributed, init_distributed
from kiem.planning.memory_estimate import setting_of
from kiem.planning.probe import Probe
from kiem.planning.recipe import Recipe

# Losses of updates 1, 10, 25, 50, 75 and 100 of the run below, on an AMD EPYC with AVX-512.
GOLDEN = {1: 6.949372, 10: 6.251003, 25: 6.203006, 50: 5.807331, 75: 5.697896, 100: 5.414833}
# A processor with AVX2 alone, as most laptops have, on one with more.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
COMMON = ("--model", "gemma3-micro", "--batch-size", "4", "--gradient-accumulation-steps", "1")
QUIET = ("--eval-steps", "0", "--save-steps", "0", "--minimal-pairs", "never")


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_losses_are_those_of_before(sample_chunks: Path, tmp_path: Path) -> None:
    """A hundred updates: a change that alters the numbers must say so here."""
    done = run_script(
        "training.py",
        *("--dataset-path", sample_chunks, "--output-dir", tmp_path, "--run-name", "run"),
        *(*COMMON, *QUIET, "--max-steps", "100", "--precision", "fp32"),
        *("--learning-rate", "3e-3"),
    )
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path)
    # Sums in another order on another processor: differences grow over a hundred updates.
    for step, loss in GOLDEN.items():
        assert found[step - 1] == pytest.approx(loss, rel=2e-5 * step), (step, found[step - 1])


@pytest.mark.slow
def test_without_a_compiler_training_goes_on_and_says_so(
    sample_chunks: Path, tmp_path: Path
) -> None:
    for name, kind in (("eager", "never"), ("compiled", "always")):
        done = run_script(
            "training.py",
            *("--dataset-path", sample_chunks, "--output-dir", tmp_path / name),
            *("--run-name", "run", *COMMON, *QUIET, "--max-steps", "3"),
            *("--precision", "fp32", "--compile", kind),
            env={"CXX": "/nonexistent"},
        )
        assert done.returncode == 0, done.stderr
        said = " ".join((done.stdout + done.stderr).split())
        assert ("training goes on without --compile" in said) == (kind == "always")
        facts = json.loads((tmp_path / name / "run" / "run.json").read_text())
        assert facts["hardware"]["compiled"] is False
    assert losses(tmp_path / "compiled") == losses(tmp_path / "eager")


def test_precision_is_the_faster_one() -> None:
    """fp32 wherever there are no instructions for bf16, which this environment hides."""
    code = (
        "from kiem.parallel.distributed import init_distributed\n"
        "with init_distributed('auto') as d: print(d.matrix_dtype, d.matrix_flops)"
    )
    done = run_script("-c", code, env=AVX2)
    assert done.returncode == 0, done.stderr
    dtype, flops = done.stdout.split()
    assert dtype == "torch.float32"
    assert float(flops) > 0
    with init_distributed("auto") as distributed:
        assert distributed.matrix_dtype == (
            torch.bfloat16 if prefers_bf16(distributed.device) else torch.float32
        )
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with init_distributed(precision) as distributed:
            assert distributed.matrix_dtype == dtype


@pytest.mark.parametrize(
    ("precision", "steps", "minutes", "expected"),
    [
        *(("fp32", 10, None, False), ("fp32", 6_000, None, True), ("fp32", 10**6, None, True)),
        *(("bf16", 6_000, None, False), ("bf16", 10**6, None, True)),
        *(("fp32", None, 2.0, False), ("fp32", None, 30.0, True)),
    ],
)
def test_layers_are_compiled_when_the_run_is_long(
    precision: Literal["fp32", "bf16"], steps: int | None, minutes: float | None, expected: bool
) -> None:
    """An update here takes 11 GFLOP; in bf16 a CPU does ten times as many in the same time."""
    model = Gemma3(preset("gemma3-micro", 1000))
    options = TrainingOptions(dataset_path=(Path(),))
    seconds = minutes * 60 if minutes is not None else None
    recipe = Recipe(4, 1, 4, 1e-3, steps, seconds, "none")
    distributed = Distributed(0, 1, torch.device("cpu"), precision, 1e12)
    setting = setting_of(model.config, options, distributed, 256)
    probe = Probe(model, options, setting, distributed, Console())
    assert probe.is_compiling_worthwhile(recipe) == expected
    always = replace(probe, options=replace(options, compile="always"))
    assert always.is_compiling_worthwhile(recipe)
    never = replace(probe, options=replace(options, compile="never"))
    assert not never.is_compiling_worthwhile(recipe)
    gpu = replace(probe.setting, device_type="cuda")
    assert replace(probe, setting=gpu).is_compiling_worthwhile(recipe)
    assert not replace(never, setting=gpu).is_compiling_worthwhile(recipe)
