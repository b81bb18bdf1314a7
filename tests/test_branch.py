"""Branches: runs that begin with a checkpoint of another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import Lives, outcome

from kiem.compute.speed import prefers_bf16
from kiem.core.errors import ExitCode
from kiem.report.branches import branches
from kiem.report.page import render
from kiem.report.record import read_record

SAVES = ("--save-steps", "3", "--save-total-limit", "4")


@pytest.fixture(scope="module")
def parent(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 updates with checkpoints of the steps 3, 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("parent")
    assert lives.run(folder, *SAVES) == [0], lives.log.read_text()
    return (folder / "run").rename(folder / "trunk")


def branch(lives: Lives, parent: Path, output: Path, *more: str, step: int = 6) -> list[int]:
    return lives.run(output, *SAVES, "--branch-from", f"{parent}@{step}", *more)


def without_branch(found: dict[str, Any]) -> dict[str, Any]:
    del found["checkpoints"]  # those before the branch are the parent's
    return found


def test_a_branch_without_a_change_is_the_run(lives: Lives, parent: Path, tmp_path: Path) -> None:
    """To the bit: weights, moments, state, and all lines of the log."""
    assert branch(lives, parent, tmp_path) == [0], lives.log.read_text()
    assert without_branch(outcome(tmp_path / "run")) == without_branch(outcome(parent))
    assert "branch of trunk after step 6: without a difference" in lives.log.read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())["branched_from"]
    assert (record["run"], record["step"], record["differences"]) == ("trunk", 6, [])


def test_a_resumed_run_or_branch_keeps_its_precision(lives: Lives, tmp_path: Path) -> None:
    """The one that this processor would not choose by itself; products in it may be slow."""
    precision = "fp32" if prefers_bf16(torch.device("cpu")) else "bf16"
    first = (*SAVES, "--precision", precision, "--max-steps", "6", "--optimizer", "adamw")
    assert lives.run(tmp_path / "whole", *first) == [0], lives.log.read_text()
    code = lives.run_until(3, tmp_path / "stopped", *first, processes=1)
    assert code in ([ExitCode.STOPPED], [0])
    again = (*first, "--precision", "auto")
    if code != [0]:
        assert lives.run(tmp_path / "stopped", *again) == [0], lives.log.read_text()
    branched = (*again, "--branch-from", f"{tmp_path / 'whole' / 'run'}@3")
    assert lives.run(tmp_path / "branch", *branched) == [0], lives.log.read_text()
    expected = without_branch(outcome(tmp_path / "whole" / "run"))
    for name in ("stopped", "branch"):
        run = tmp_path / name / "run"
        assert without_branch(outcome(run)) == expected
        assert json.loads((run / "run.json").read_text())["hardware"]["precision"] == precision


def test_a_stopped_branch_goes_on_with_its_own_checkpoints(
    lives: Lives, parent: Path, sample_chunks: Path, tmp_path: Path
) -> None:
    """Also without the run that it began with; what is different is listed and recorded."""
    trunk = tmp_path / "trunk"
    shutil.copytree(parent, trunk)
    changes = ("--learning-rate", "1e-3", "--anneal", str(sample_chunks), "--anneal-share", "0.3")
    assert branch(lives, trunk, tmp_path / "a", *changes) == [0], lives.log.read_text()
    code = lives.run_until(
        9, tmp_path / "b", *SAVES, "--branch-from", f"{trunk}@6", *changes, processes=1
    )
    assert code in ([ExitCode.STOPPED], [0])
    shutil.rmtree(trunk)
    if code != [0]:
        assert branch(lives, trunk, tmp_path / "b", *changes) == [0], lives.log.read_text()
    found = outcome(tmp_path / "b" / "run")
    assert without_branch(found) == without_branch(outcome(tmp_path / "a" / "run"))
    record = json.loads((tmp_path / "b" / "run" / "run.json").read_text())["branched_from"]
    learning_rate, share, anneal = record["differences"]
    assert learning_rate == "learning_rate was None, is 0.001"
    assert share == "anneal_share was None, is 0.3" and anneal == "anneal is chunked_sample"
    assert f"branch of trunk after step 6: {learning_rate}; " in lives.log.read_text()
    ours, theirs = (outcome(run)["metrics"] for run in (tmp_path / "b" / "run", parent))
    before = [line for line in theirs if line["step"] <= 6]
    assert ours[: len(before)] == before and ours[len(before)] != theirs[len(before)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("@6", ("--seed", "7"), "a branch cannot differ in this: seed was 42, is 7"),
        ("@6", ("--batch-size", "4"), "chunks_per_step was 2, is 4"),
        ("@6", ("--model", "gemma3-nano"), "model was 'gemma3-micro', is 'gemma3-nano'"),
        ("@6", ("--optimizer", "adamw"), "optimizer was 'muon', is 'adamw'"),
        ("@7", (), "has checkpoints of these steps: 3, 6, 9, 12."),
        ("@x", (), "is not RUN@STEP"),
        ("@" + 5000 * "9", (), "is not RUN@STEP"),
        ("", (), "is not RUN@STEP"),
        ("@6", ("--resume", "x"), "contradicts --resume"),
        ("@6", ("--run-name", "trunk"), "a run cannot branch from itself"),
    ],
)
def test_what_a_branch_cannot_be(
    lives: Lives, parent: Path, tmp_path: Path, name: str, options: tuple[str, ...], message: str
) -> None:
    before = len(lives.log.read_text())
    output = parent.parent if "trunk" in options else tmp_path
    (code,) = lives.run(output, *SAVES, "--branch-from", f"{parent}{name}", *options)
    said = lives.log.read_text()[before:]
    assert code in (ExitCode.BAD_OPTION, ExitCode.NOT_FOUND), said
    assert message in said
    assert "Traceback" not in said


def test_the_report_shows_what_a_branch_makes_otherwise(tmp_path: Path) -> None:
    """Against the differences by hand; without its parent a branch is a run like others."""
    trunk, other = tmp_path / "trunk", tmp_path / "other"
    for run, less in ((trunk, 0.0), (other, 0.25)):
        run.mkdir()
        lines = [{"step": n, "loss": 4 - n / 8 - less * (n > 6)} for n in range(1, 13)]
        bpb = 2 - less / 2
        lines += [{"step": 12, "test_loss": 3 - less, "test_bpb": bpb}]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (other / "run.json").write_text(json.dumps({"branched_from": {"run": "trunk", "step": 6}}))
    records = [read_record(trunk), read_record(other)]
    ((text, (chart,)),) = branches(records)
    assert text == (
        "other is a branch of trunk after step 6. "
        "After step 12 it has 1.8750 bits per byte, 0.1250 better."
    )
    training, test = chart["series"]
    assert training["step"] == [7, 8, 9, 10, 11, 12] and training["y"] == [-0.25] * 6
    assert test["step"] == [12] and test["y"] == [-0.25]
    page = render(records)
    assert text in page and "Loss of other less that of trunk" in page
    assert "is a branch of" not in render(records[1:])
