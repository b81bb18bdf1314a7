"""Tokens in the environment are nobody's business: they are in no file and no output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

HF_TOKEN = "hf_CanaryNr7QwErTyUiOpAsDfGhJkLzXcVb"
WANDB_KEY = "c0ffee" * 6 + "beef"
# Training that ends with a traceback, in the middle of an update.
CRASH = """
import sys
from kiem.model.gemma3 import Gemma3
def crash(*_): raise RuntimeError("crash")
Gemma3.forward = crash
sys.argv = ["training.py", *sys.argv[1:]]
from training import main
from kiem.cli import run
from kiem.config import TrainingOptions
sys.exit(run(TrainingOptions, "training.py", main))
"""


@pytest.mark.slow
def test_tokens_are_in_no_file_and_no_output(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    env = {
        **os.environ,
        **{"HF_TOKEN": HF_TOKEN, "WANDB_API_KEY": WANDB_KEY, "WANDB_MODE": "offline"},
        # Nobody listens there.
        **{"HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path / "home")},
        **{"HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    }
    said = []

    def run(code: int, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, check=False
        )
        assert done.returncode == code, done.stderr.decode()
        said.append(done.stdout + done.stderr)

    output = ("--output-dir", str(tmp_path))
    sample = ("--source", "sample", "--tokenizer", "train:600", "--chunk-size", "64")
    run(0, "preprocess.py", *sample, *output, "--name", "chunks")
    run(5, "preprocess.py", "--dataset-size", "10k", *output)  # no network: the token was sent
    chunks = ("--dataset-path", str(tmp_path / "chunks"), *output, "--batch-size", "2")
    short = ("--max-steps", "2", "--save-steps", "1", "--use-wandb")
    run(0, "training.py", *chunks, "--model", "gemma3-micro", "--run-name", "run", *short)
    run(5, "training.py", *chunks, "--init-from", "google/gemma-3-1b-pt")
    crash = ("--model", "gemma3-micro", "--run-name", "crash", *short)
    run(1, "-c", CRASH, *chunks, *crash)
    assert b"RuntimeError: crash" in said[-1]
    model = ("--model-path", str(tmp_path / "run" / "final_model"))
    run(0, "inference.py", *model, "--prompt", "Nederland", "--max-new-tokens", "4")
    run(0, "evaluate.py", *model, "--data", "sample", "--max-documents", "2")
    export = ("--format", "safetensors", "--push-to-hub", "me/model", "--dry-run")
    run(0, "export.py", *model, *export, "--output", str(tmp_path / "export"))
    run(0, "report.py", "--runs", str(tmp_path / "run"))

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    contents = {str(path): path.read_bytes() for path in files}
    for place, data in [*contents.items(), *(("output", text) for text in said)]:
        assert HF_TOKEN.encode() not in data, place
        assert WANDB_KEY.encode() not in data, place
