"""The same units on a real Ray cluster of two workers, one of which is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import ROOT, SMALL_UNITS_PROGRAM, run_script
from ray_cluster import ENVIRONMENT

from kiem.core.errors import ExitCode
from kiem.tokenizer.tokenizer import Tokenizer


def test_ray_gives_the_same_bytes_though_a_worker_is_killed(
    tmp_path: Path, sample_texts: list[str], trained: Tokenizer
) -> None:
    lines = [json.dumps({"text": f"{text} {n}"}) for n in range(60) for text in sample_texts]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    options = ["--source", str(tmp_path / "in.jsonl"), "--chunk-size", "128"]
    options += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--output-dir", str(tmp_path)]
    command = [sys.executable, "-c", SMALL_UNITS_PROGRAM, *options, "--num-proc", "2"]
    program = subprocess.Popen(
        [*command, "--executor", "ray", "--name", "ray"],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    work = tmp_path / ".ray.unfinished"
    ends = time.monotonic() + 120
    while len(list(work.glob("*.unit"))) < 5:
        assert time.monotonic() < ends
        assert program.poll() is None, program.communicate()[0]
        time.sleep(0.02)
    workers = [
        process
        for process in psutil.Process(program.pid).children(recursive=True)
        if process.name().startswith("ray::_finish")
    ]
    assert workers
    workers[0].kill()
    output = program.communicate(timeout=300)[0]
    assert program.returncode == 0, output
    subprocess.run([*command, "--name", "local"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    ray, local = (
        {
            str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in (tmp_path / name).rglob("*.*")
        }
        for name in ("ray", "local")
    )
    assert ray == local


def test_an_unreachable_cluster_is_named(tmp_path: Path) -> None:
    done = run_script(
        "preprocess.py",
        *("--source", "sample", "--tokenizer", "train:600", "--output-dir", tmp_path),
        *("--executor", "ray", "--ray-address", "127.0.0.1:9"),
    )
    assert done.returncode == ExitCode.NETWORK, done.stderr
    assert "no Ray cluster answers" in done.stderr
    assert "Traceback" not in done.stderr
