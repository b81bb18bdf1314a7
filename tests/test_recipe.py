"""Which recipe is better: significance, benchmarks/recipe.py, and what a recipe may rely on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL, run_script

from kiem.evaluation.significance import compare, student_t
from kiem.model.gemma3 import Gemma3, initialize

BENCHMARK = "benchmarks/recipe.py"


@pytest.mark.parametrize(
    ("freedom", "expected"),  # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (100, 1.984)],
)
def test_students_t(freedom: int, expected: float) -> None:
    assert student_t(freedom) == pytest.approx(expected, abs=5e-4)


def test_runs_are_compared_in_pairs() -> None:
    """The sleep data of Student (1908), of ten pairs: t = 4.0621."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = compare(second, first)
    assert found.gain == pytest.approx(1.58)
    assert found.gain / found.standard_error == pytest.approx(4.0621, abs=1e-4)
    assert str(found) == "better by 1.5800 ± 0.3890"
    assert compare(first, second).verdict == "worse"


def test_how_many_more_runs_would_decide() -> None:
    found = compare([1.5, 1.5, 1.5], [1.47, 1.49, 1.51])
    assert found.verdict == "not decidable"
    gain, deviation, needed = 0.01, 0.02, 3 + (found.num_more or 0)
    for number, decides in ((needed - 1, False), (needed, True)):
        assert (gain > student_t(number - 1) * deviation / math.sqrt(number)) == decides
    assert str(found) == f"not decidable; {needed - 3} more runs (better by 0.0100 ± 0.0115)"
    assert str(compare([1.5], [1.4])) == "not decidable; at least 1 more run (better by 0.1000)"
    assert str(compare([], [])) == "not decidable; no seed in common"
    assert compare([1.0, 2.0], [1.0, 2.0]).num_more is None


@pytest.mark.slow
def test_the_benchmark_does_only_what_is_missing(sample_texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in sample_texts]
    (folder / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    runs = tmp_path / "runs.jsonl"
    command = [
        BENCHMARK,
        "--text",
        folder,
        "--runs",
        runs,
        "--chunks",
        tmp_path,
        "--sizes",
        "tiny",
        "--updates",
        "6",
    ]
    command += ["--precision", "fp32", "--variants", "share=0.5", "momentum=0.95"]

    done = run_script(*command, "--seeds", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    first = runs.read_text()
    found = {line["variant"]: line for line in map(json.loads, first.splitlines())}
    assert found.keys() == {"default", "share=0.5", "momentum=0.95"}
    # A candidate without a change is kiem's own optimizer, up to rounding.
    default, same, shorter = (found[n]["bpb"] for n in ("default", "momentum=0.95", "share=0.5"))
    assert same == pytest.approx(default, abs=1e-4)
    assert shorter > default + 1e-3
    assert str(tmp_path) not in first

    done = run_script(*command, "--seeds", "0", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.read_text().startswith(first)
    assert len(runs.read_text().splitlines()) == 6
    assert "worse by" in done.stdout or "not decidable" in done.stdout


@pytest.mark.parametrize(
    ("matrix", "is_invariant"),
    [
        *(("self_attn.q_proj", True), ("self_attn.k_proj", True), ("self_attn.v_proj", True)),
        *(("self_attn.o_proj", True), ("mlp.up_proj", True), ("mlp.down_proj", True)),
        ("mlp.gate_proj", False),
    ],
)
def test_which_matrices_of_gemma_have_no_size(matrix: str, is_invariant: bool) -> None:
    """The norms behind them undo every positive factor; GELU does not pass it on to one."""
    model = Gemma3(dataclasses.replace(SMALL, rms_norm_eps=1e-12))
    initialize(model, 0)
    ids = torch.randint(3, SMALL.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.hidden_states(ids)
        model.get_parameter(f"model.layers.2.{matrix}.weight").mul_(7.0)
        change = (model.hidden_states(ids) - before).norm() / before.norm()
    assert (change < 1e-4) == is_invariant, change
