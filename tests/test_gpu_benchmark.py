"""benchmarks/gpu.py, so that no minute of a rented GPU is lost to a typing mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, run_script


def records(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_all_parts_can_be_rehearsed(tmp_path: Path) -> None:
    """Without compiled layers, of which alone the part plan has figures to compare."""
    file = tmp_path / "gpu.jsonl"
    no_compiler = {"CC": "false", "CXX": "false"}
    done = run_script("benchmarks/gpu.py", "--rehearse", "--json", file, env=no_compiler)
    assert done.returncode == 0, done.stdout
    found = records(file)
    assert {record["part"] for record in found} == {
        *("versions", "attention", "loss", "training", "trainer", "decoding", "parity"),
        *("text", "plan", "resume", "processes", "memory", "tests"),
    }
    assert {record["part"] for record in found if record["check"] == "end"} <= {"plan"}
    verdicts = {record["verdict"] for record in found}
    assert verdicts <= {"ok", "measured", "left out", "eager only"}
    assert "REHEARSAL" in done.stdout


def test_a_run_that_is_stopped_leaves_results_and_no_processes(tmp_path: Path) -> None:
    """Here on a machine without a compiler, which it says."""
    file = tmp_path / "gpu.jsonl"
    command = ["benchmarks/gpu.py", "--rehearse", "--json", str(file)]
    environment = {**os.environ, "PATH": "", "CC": "false", "CXX": "false"}
    started = subprocess.Popen(
        [sys.executable, *command, "--parts", "versions", "trainer"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not file.exists() or not any(r["check"] == "torch.compile" for r in records(file)):
        assert started.poll() is None
        time.sleep(0.05)
    children = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGTERM)
    output, _ = started.communicate(timeout=60)
    assert started.returncode != 0
    assert not any(child.is_running() for child in children)
    by_check = {record["check"]: record for record in records(file)}
    assert by_check["torch.compile"]["verdict"] == "eager only"
    assert "torch.compile" in output
