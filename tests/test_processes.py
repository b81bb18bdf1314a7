"""Several processes agree on what they do, or all end with the message of the one that cannot."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from lives import OPTIONS, Lives
from rich.console import Console
from safetensors.torch import load_file, save_file

from kiem.config import PreprocessOptions, TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.prepare.preprocess import preprocess
from kiem.model.io import read_config
from kiem.parallel.launch import Place, choose_device, prints_output, read_place
from kiem.training.checkpoint import list_checkpoints, verify_checkpoint
from kiem.training.loop import train
from kiem.training.resume import check_same_run

QUIET = Console(quiet=True)
# Each process with a clock of its own; the name of the run is left to them.
CLOCKS = """
import datetime, time
from kiem.training import setup
class Clock(datetime.datetime):
    @classmethod
    def now(cls, zone=None):
        return datetime.datetime(2026, 1, 1 + int(os.environ["RANK"]), tzinfo=zone)
setup.datetime = Clock
place = order["arguments"].index("--run-name")
del order["arguments"][place:place + 2]
"""
# Two machines; the arguments on the second one are others than those on the first.
OTHER = """
os.environ["LOCAL_RANK"] = "0"
if os.environ["RANK"] == "1":
    if "--dataset-path" in {arguments!r}:  # in place of the other one, not beside it
        place = order["arguments"].index("--dataset-path")
        del order["arguments"][place : place + 2]
    order["arguments"] += {arguments!r}
from kiem.parallel import agreement
agreement._MAX_SECONDS_UNTIL_SEEN = 0.2
"""
# Something fails in one process alone.
FAIL = """
import importlib
from kiem.core.errors import ExitCode, UserError
def fail(*arguments, **named):
    raise {error}
if os.environ["RANK"] == "{rank}":
    module = importlib.import_module("kiem.training.{module}")
    setattr(module, "{name}", fail)
"""
# The disk refuses checkpoints by their number.
REFUSE = """
from kiem.core.errors import ExitCode, UserError
from kiem.training import loop
save, calls = loop.save_checkpoint, []
def refuse(*arguments):
    calls.append(1)
    if str(len(calls)) in "{refused}":
        raise {error}
    return save(*arguments)
loop.save_checkpoint = refuse
"""
REFUSAL = (
    "UserError('the disk is full', where='/mnt', fix='Free some.', exit_code=ExitCode.DISK_SPACE)"
)
DEFECT = "KeyError('nee')"


def said(lives: Lives, start: int = 0) -> str:
    return lives.log.read_text()[start:] if lives.log.exists() else ""


def runs(output: Path) -> list[Path]:
    return [path for path in output.iterdir() if path.is_dir() and not path.is_symlink()]


def test_each_process_has_its_own_clock(lives: Lives, tmp_path: Path) -> None:
    codes = lives.run(tmp_path, processes=2, patch=CLOCKS)
    assert codes == [0, 0], said(lives)
    (run,) = runs(tmp_path)
    assert run.name == "gemma3-micro-dutch-20260101T000000Z"
    for checkpoint in list_checkpoints(run / "checkpoints"):
        verify_checkpoint(checkpoint)
        assert len(list(checkpoint.glob("optimizer-*-of-00002.safetensors"))) == 2
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-12"
    assert (run / "final_model" / "model.safetensors").exists()


def test_two_launchers_that_start_apart(sample_chunks: Path, tmp_path: Path) -> None:
    """As on two machines: a launcher each, the second one two seconds later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = []
    for rank in (0, 1):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
        words += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        words += ["training.py", "--dataset-path", str(sample_chunks)]
        launchers.append(
            subprocess.Popen(
                [*words, "--output-dir", str(tmp_path), *OPTIONS],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        time.sleep(2)
    texts = [launcher.communicate(timeout=600)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    (run,) = runs(tmp_path)
    assert [path.name for path in list_checkpoints(run / "checkpoints")][-2:] == [
        "step-9",
        "step-12",
    ]


@pytest.mark.parametrize(
    ("rank", "module", "name"),
    [
        (0, "setup", "verify_shards"),
        (1, "setup", "read_mixture"),
        (0, "setup", "run_name"),
        (0, "setup", "locked_folder"),
        (1, "setup", "check_space"),
        (0, "resume", "newest_valid"),
        (0, "log", "write_json"),
        (0, "log", "tracker_names"),
        (1, "setup", "build_model"),
        (1, "checkpoint", "write_weights"),
        (0, "checkpoint", "write_manifest"),
        (0, "loop", "write_final_model"),
        (0, "log", "append_json_lines"),
    ],
)
def test_one_that_fails_ends_all_with_its_message(
    rank: int, module: str, name: str, lives: Lives, tmp_path: Path
) -> None:
    start = len(said(lives))
    patch = FAIL.format(error=REFUSAL, rank=rank, module=module, name=name)
    options = ("--on-save-failure", "stop", "--max-steps", "3")
    codes = lives.run(tmp_path, *options, processes=2, patch=patch)
    assert codes == [ExitCode.DISK_SPACE] * 2, said(lives, start)
    text = said(lives, start)
    assert "the disk is full" in text
    assert "Free some." in text
    assert "Traceback" not in text
    assert "another process has died" not in text
    if rank == 1:  # the first one tells whose it is
        assert f"process 1 on {socket.gethostname()}: /mnt" in text


def test_a_defect_in_one_ends_all(lives: Lives, tmp_path: Path) -> None:
    start = len(said(lives))
    patch = FAIL.format(error=DEFECT, rank=1, module="setup", name="build_model")
    assert lives.run(tmp_path, processes=2, patch=patch) == [ExitCode.PROCESS_LOST, 1]
    assert f"process 1 on {socket.gethostname()}: it has failed (KeyError: 'nee')" in said(
        lives, start
    )


@pytest.fixture(scope="module")
def other_chunks(tmp_path_factory: pytest.TempPathFactory, sample_chunks: Path) -> Path:
    """A chunk directory with the same tokenizer and other chunks."""
    tokenizer = str(sample_chunks / "tokenizer.json")
    output = tmp_path_factory.mktemp("other")
    given = PreprocessOptions(
        source=("sample",), tokenizer=tokenizer, chunk_size=32, output_dir=output, num_proc=1
    )
    return preprocess(given, QUIET)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """A model of the same shape and other weights."""
    folder = tmp_path_factory.mktemp("other") / "final_model"
    shutil.copytree(trained_run / "final_model", folder)
    (folder / "manifest.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, folder / "model.safetensors")
    return folder


JOINED = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
DIFFERENCES = {
    "an option": (["--learning-rate", "1e-4"], ExitCode.BAD_OPTION, "--learning-rate: is 0.0001"),
    "an option more": (["--max-minutes", "3"], ExitCode.BAD_OPTION, "--max-minutes: is 3.0 here"),
    "no chunks": (["--dataset-path", "/nergens"], ExitCode.NOT_FOUND, "no such chunk directory"),
    "other chunks": (["--dataset-path", "CHUNKS"], ExitCode.BAD_OPTION, "sha256 of the chunk"),
    "damaged chunks": (
        ["--dataset-path", "DAMAGED"],
        ExitCode.DAMAGED,
        "its sha256 differs",
    ),
    "no shared disk": (["--output-dir", "FOLDER"], ExitCode.NOT_FOUND, "not the folder that proc"),
    "other weights": (["--init-from", "MODEL"], ExitCode.BAD_OPTION, "sum over the weights"),
    "another prompt": (["--sample-prompt", "x"], ExitCode.BAD_OPTION, "--sample-prompt: is ['x']"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_what_differs_between_machines_is_said(
    what: str,
    lives: Lives,
    sample_chunks: Path,
    other_chunks: Path,
    other_model: Path,
    trained_run: Path,
    tmp_path: Path,
) -> None:
    arguments, code, message = DIFFERENCES[what]
    damaged = Path(shutil.copytree(sample_chunks, tmp_path / "damaged"))
    (shard,) = (damaged / "train").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    places = {
        "CHUNKS": other_chunks,
        "DAMAGED": damaged,
        "FOLDER": tmp_path / "own",
        "MODEL": other_model,
    }
    given = [str(places.get(word, word)) for word in arguments]
    common: tuple[str, ...] = ()
    patch = OTHER.format(arguments=given)
    if what == "other weights":
        common = ("--init-from", str(trained_run / "final_model"))
        patch += 'p = order["arguments"].index("--model"); del order["arguments"][p:p + 2]\n'
    start = len(said(lives))
    codes = lives.run(tmp_path / "shared", *common, processes=2, patch=patch)
    text = said(lives, start)
    assert codes == [code] * 2, text
    assert f"process 1 on {socket.gethostname()}" in text
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.rglob("step-*"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE: is 'x', not a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: is '0', not a number from 1"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: is '999"),
        ({"RANK": "1"}, "RANK: is '1', not a number from 0 to 0"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK: is '3'"),
        ({"LOCAL_RANK": "٣"}, "LOCAL_RANK: is '٣'"),
        ({"WORLD_SIZE": "2"}, "RANK: is not set, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR: is not set"),
        ({**JOINED, "RANK": "2"}, "RANK: is '2', not a number from 0 to 1"),
        (
            {**JOINED, "MASTER_PORT": "99999"},
            "MASTER_PORT: is '99999', not a number from 0 to 65535",
        ),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "0"}, None),
    ],
)
def test_variables_that_make_no_sense_are_named(
    given: dict[str, str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert prints_output(), "else nobody would read the message"
    if message is None:
        assert read_place() == Place(0, 0, 1)
        return
    with pytest.raises(UserError, match=message) as caught:
        read_place()
    assert caught.value.exit_code == ExitCode.BAD_OPTION


@pytest.mark.parametrize(
    ("local_rank", "given", "expected"),
    [
        (0, {"LOCAL_WORLD_SIZE": "2"}, "cuda:0"),
        (1, {"LOCAL_WORLD_SIZE": "2"}, "cuda:1"),
        (
            0,
            {"LOCAL_WORLD_SIZE": "4"},
            "4 processes were started on this machine, which has 2 GPUs",
        ),
        (2, {"LOCAL_WORLD_SIZE": ""}, "3 processes were started"),
        (2, {"LOCAL_WORLD_SIZE": "4", "KIEM_SHARE_GPUS": "true"}, "cuda:0"),
        (3, {"LOCAL_WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "true"}, "cpu"),
        (1, {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE: is '1', not a number from 2"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    local_rank: int, given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with two."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    place = {"WORLD_SIZE": "4", "RANK": f"{local_rank}", "LOCAL_RANK": f"{local_rank}"}
    for name, value in {**JOINED, **place, **given}.items():
        monkeypatch.setenv(name, value)
    if expected.startswith(("cuda", "cpu")):
        assert str(choose_device()) == expected
        assert [str(device) for device in chosen] == [expected] * expected.startswith("cuda")
        return
    with pytest.raises(UserError) as caught:
        choose_device()
    assert expected in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_OPTION


def test_a_port_that_is_taken_is_said(sample_chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**given, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="cannot meet at MASTER_PORT") as caught:
            train(TrainingOptions((sample_chunks,)), QUIET)
    assert caught.value.exit_code == ExitCode.PROCESS_LOST


def test_the_end_of_one_of_several_is_not_left_to_python() -> None:
    """A thread of torch's can abort a process that finalizes: a launcher sees a failure."""
    program = "import atexit, os; from kiem.parallel.launch import leave; atexit.register(os.abort)"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print('the last line'); leave(3)"],
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "the last line\n", "")


def test_machines_of_different_kinds_are_told(lives: Lives, tmp_path: Path) -> None:
    """As when the driver of one does not work; its processes would wait for ever."""
    patch = 'torch.cuda.is_available = lambda: os.environ["RANK"] == "1"\n'
    patch += "torch.cuda.device_count = lambda: 2\n"
    patch += "torch.cuda.set_device = lambda device: None\n"
    start = len(said(lives))
    assert lives.run(tmp_path, processes=2, patch=patch) == [ExitCode.BAD_OPTION] * 2
    assert "process 1: computes on a cuda, process 0 on a cpu" in said(lives, start)


def test_without_checkpoints_no_disk_needs_to_be_shared(lives: Lives, tmp_path: Path) -> None:
    patch = OTHER.format(arguments=["--output-dir", str(tmp_path / "own")])
    options = ("--save-steps", "0", "--max-steps", "2")
    codes = lives.run(tmp_path / "shared", *options, processes=2, patch=patch)
    assert codes == [0, 0], said(lives)
    assert (tmp_path / "shared" / "run" / "final_model").is_dir()
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("save_steps", "refused", "code"),
    [(3, "1234", ExitCode.DISK_SPACE), (3, "234", 0), (12, "1", 0)],
)
def test_the_first_checkpoint_must_succeed(
    save_steps: int, refused: str, code: int, lives: Lives, tmp_path: Path
) -> None:
    """A run that could not be resumed stops, unless it is at its end and has its model."""
    patch = REFUSE.format(refused=refused, error=REFUSAL)
    codes = lives.run(tmp_path, "--save-steps", str(save_steps), patch=patch)
    assert codes == [code], said(lives)
    assert (tmp_path / "run" / "final_model").exists() == (code == 0)
    assert "step 3" in said(lives)


def test_another_shape_is_another_run(trained_run: Path) -> None:
    checkpoint = trained_run / "checkpoints" / "step-12"
    config = read_config(checkpoint)
    now = {"model": "gemma3-custom", **asdict(config)}
    known = json.loads(json.dumps({"fingerprint": now, "changeable": {}}))
    check_same_run(checkpoint, known, now, {}, QUIET)
    other = {**now, **asdict(replace(config, num_hidden_layers=2, rope_theta=5e5))}
    with pytest.raises(UserError, match="num_hidden_layers was 6, is 2; rope_theta was") as caught:
        check_same_run(checkpoint, known, other, {}, QUIET)
    assert caught.value.exit_code == ExitCode.ALREADY_EXISTS
