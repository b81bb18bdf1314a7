"""A tokenizer in a process of its own: the same ids and texts, and one message when it ends."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, run_script

from kiem.core.errors import ExitCode, UserError
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.model.io import write_model
from kiem.tokenizer.process import serve, tokenizer_process
from kiem.tokenizer.tokenizer import Tokenizer, parse_tokenizer, write_tokenizer


def ended() -> UserError:
    return UserError("it was ended", fix="", exit_code=ExitCode.OUT_OF_MEMORY)


def test_several_clients_get_their_answers(trained: Tokenizer) -> None:
    with tokenizer_process(trained, 2, ended) as (first, second):
        for texts in (["Een dag", "in mei"], ["<eos>", ""], []):
            expected = trained.encode_batch(texts)
            assert first.encode_batch(texts) == second.encode_batch(texts) == expected
            for ids in expected:
                assert first.decode(ids) == second.decode(ids) == trained.decode(ids)


def test_a_killed_process_is_told(trained: Tokenizer) -> None:
    others = psutil.Process().children()  # of other tests
    with tokenizer_process(trained, 1, ended) as (client,):
        client.encode_batch(["Een dag"])
        (child,) = (child for child in psutil.Process().children() if child not in others)
        child.kill()
        child.wait()
        with pytest.raises(UserError, match="it was ended"):
            client.encode_batch(["in mei"])


def test_a_tokenizer_that_cannot_be_loaded_is_told(trained: Tokenizer) -> None:
    description = json.loads(trained.json_bytes)
    description["model"]["merges"] = [["heel", "nergens"]]
    broken = parse_tokenizer(json.dumps(description).encode(), "changed")
    with tokenizer_process(broken, 1, ended) as (client,):
        for _ in range(2):
            with pytest.raises(UserError, match="not a tokenizer"):
                client.encode_batch(["Een dag"])


def test_a_client_that_ends_before_it_reads_its_answer(trained: Tokenizer) -> None:
    """As happens when another worker met a mistake: no traceback beside its message."""
    ours, theirs = multiprocessing.Pipe()
    ours.send(("encode_batch", ["een tekst"]))
    ours.close()
    serve(trained, theirs)


@pytest.fixture(scope="module")
def model_folder(gemma: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with Gemma's tokenizer, which takes seconds to load."""
    assert gemma.loads_slowly
    folder = tmp_path_factory.mktemp("model")
    model = Gemma3(preset("gemma3-micro", gemma.num_rows))
    initialize(model, seed=0)
    write_model(model, folder, gemma.special_ids)
    write_tokenizer(gemma, folder)
    return folder


def test_inference_writes_the_same_with_and_without_a_process(
    model_folder: Path, tmp_path: Path
) -> None:
    """With a large tokenizer the screen takes what a process of its own encodes and decodes."""
    output = tmp_path / "output.jsonl"
    options = ("--model-path", model_folder, "--prompt", "Één dag in <mei>")
    options = (*options, "--max-new-tokens", "20")
    env = {"PYTHONWARNINGS": "error"}  # also: a Python of its own, which has not imported torch
    on_screen = run_script("inference.py", *options, env=env)
    assert on_screen.returncode == 0, on_screen.stderr
    in_file = run_script("inference.py", *options, "--output-file", output)
    assert in_file.returncode == 0, in_file.stderr
    (line,) = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert line["text"] in on_screen.stdout


def test_inference_tells_that_its_tokenizer_was_killed(model_folder: Path) -> None:
    words = [sys.executable, "inference.py", "--model-path", str(model_folder), "--prompt", "Het"]
    program = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (children := psutil.Process(program.pid).children()):
        assert program.poll() is None
        time.sleep(0.01)
    children[0].kill()
    _, said = program.communicate(timeout=300)
    assert program.returncode == ExitCode.OUT_OF_MEMORY
    assert "the tokenizer's process was ended from outside" in said
    assert "Traceback" not in said
