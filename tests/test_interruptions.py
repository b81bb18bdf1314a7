"""Training that is killed, stopped or left alone ends the same to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from lives import OPTIONS, SCALE, Lives, chaos, interrupt_often, outcome

from kiem.core.errors import ExitCode
from kiem.training.checkpoint import list_checkpoints, verify_checkpoint

# So that many kills come in the middle of a save.
SAVES = ("--save-steps", "1")
Undisturbed = tuple[dict[str, Any], float]


def undisturbed(lives: Lives, folder: Path, processes: int) -> Undisturbed:
    """The outcome of a run that nothing happens to, and how long it takes."""
    began = time.monotonic()
    codes = lives.run(folder, *SAVES, processes=processes)
    assert codes == [0] * processes, lives.log.read_text()
    return outcome(folder / "run"), time.monotonic() - began


@pytest.fixture(scope="module")
def one(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(lives, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(lives, tmp_path_factory.mktemp("two"), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "num"), [(1, 120), (2, 80)])
def test_killed_at_any_moment(
    processes: int, num: int, lives: Lives, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected, seconds = request.getfixturevalue({1: "one", 2: "two"}[processes])
    kill = [signal.SIGKILL]
    how = {"signals": kill, "processes": processes, "seconds": seconds, "options": SAVES}
    chance = chaos(f"kill {processes}")
    counts = interrupt_often(lives, tmp_path, expected, round(num * SCALE), chance, **how)
    print(counts)
    assert counts["in a save"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "num"), [(1, 30), (2, 20)])
def test_stopped_by_a_signal_at_any_moment(
    processes: int, num: int, lives: Lives, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected, seconds = request.getfixturevalue({1: "one", 2: "two"}[processes])
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    how = {"signals": signals, "processes": processes, "seconds": seconds, "options": SAVES}
    chance = chaos(f"signal {processes}")
    counts = interrupt_often(lives, tmp_path, expected, round(num * SCALE), chance, **how)
    print(counts)


def wait_for(condition: Any, seconds: float = 300) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def wait_for_first_loss(folder: Path) -> None:
    metrics = folder / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"loss"' in metrics.read_text())


def test_a_signal_saves_at_once_and_has_its_own_code(
    lives: Lives, one: Undisturbed, tmp_path: Path
) -> None:
    pids = lives.start(tmp_path, "--save-steps", "12")
    wait_for_first_loss(tmp_path)
    os.kill(pids[0], signal.SIGTERM)
    assert lives.wait(pids) == [ExitCode.STOPPED]
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    verify_checkpoint(checkpoint)
    said = lives.log.read_text()
    assert "a second signal stops at once" in said
    assert f"stopped by SIGTERM after step {checkpoint.name[5:]}; a checkpoint is saved" in said
    assert lives.run(tmp_path, "--save-steps", "12") == [0]
    found = outcome(tmp_path / "run")
    assert found["metrics"] == one[0]["metrics"]
    assert found["final_model/model.safetensors"] == one[0]["final_model/model.safetensors"]


# A process gets a signal when it calls a function for the n-th time; then none calls it again.
SIGNAL = """
import os, signal
from kiem.training import loop, validation
owner, calls = {owner}, []
original = owner.{name}
def interrupt(*arguments, **named):
    calls.append(1)
    if len(calls) > {call}:
        os._exit(99)
    if len(calls) == {call} and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.{signal})
    return original(*arguments, **named)
owner.{name} = interrupt
"""
EVALUATES = (
    *("--max-steps", "4", "--eval-steps", "2", "--eval-chunks", "8", *SAVES),
    *("--minimal-pairs", "always", "--sample-prompt", "Nederland is", "Er was eens"),
)


def test_a_signal_ends_an_evaluation_which_is_then_done_once(lives: Lives, tmp_path: Path) -> None:
    codes = lives.run(tmp_path / "whole", *EVALUATES, processes=2)
    assert codes == [0, 0], lives.log.read_text()[-3000:]
    for owner, name, call, step in (
        ("validation", "token_cross_entropy", 1, 2),  # the evaluation after step 2
        ("loop", "save", 1, 2),  # killed when the evaluation is in the log, not in a checkpoint
        ("validation", "prefers_good", 2, 4),
        ("validation", "complete", 1, 4),
    ):
        kind = "SIGKILL" if name == "save" else "SIGTERM"
        rank = 0 if name == "complete" else 1
        patch = SIGNAL.format(owner=owner, name=name, call=call, signal=kind, rank=rank)
        begins = len(lives.log.read_text())
        codes = lives.run(tmp_path, *EVALUATES, processes=2, patch=patch)
        said = lives.log.read_text()[begins:]
        if name == "save":
            assert codes[rank] == -signal.SIGKILL, said
        else:
            assert codes == [ExitCode.STOPPED] * 2, said
            assert f"after step {step}; a checkpoint is saved" in said
    assert lives.run(tmp_path, *EVALUATES, processes=2) == [0, 0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole" / "run")


def test_a_second_signal_ends_at_once(lives: Lives, tmp_path: Path) -> None:
    long_updates = ("--gradient-accumulation-steps", "2000")
    pids = lives.start(tmp_path, *long_updates)
    wait_for(lambda: (tmp_path / "run" / "run.json").exists())
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGTERM)
    wait_for(lambda: "a second signal stops at once" in lives.log.read_text())
    os.kill(pids[0], signal.SIGTERM)  # as launchers pass it on: the same request
    time.sleep(1.2)
    os.kill(pids[0], signal.SIGTERM)
    assert lives.wait(pids) == [128 + signal.SIGTERM]
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"loss"' not in log  # it did not wait for the end of the update
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


# After six updates the second process stops, before it computes or before it says whether to stop.
HANG = """
import os, signal
from kiem.training import loop, signals
signals.HANG_SECONDS = 5.0
owner = {owner}
original, calls = owner.{name}, []
def stand_still(*arguments):
    calls.append(1)
    if len(calls) == {call} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return original(*arguments)
owner.{name} = stand_still
"""


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [("loop", "micro_batches", 7), ("signals.StopSignals", "is_asked", 6)],
)
def test_a_process_that_hangs_is_noticed(
    owner: str, name: str, call: int, lives: Lives, tmp_path: Path
) -> None:
    long = ("--max-steps", "20", "--save-steps", "5", "--eval-steps", "0")
    pids = lives.start(
        tmp_path, *long, processes=2, patch=HANG.format(owner=owner, name=name, call=call)
    )
    said = len(lives.log.read_text())
    stopped = psutil.Process(pids[1])
    wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED)
    wait_for(lambda: "has not ended for" in lives.log.read_text()[said:])
    assert lives.wait(pids[:1]) == [ExitCode.HUNG]
    os.kill(pids[1], signal.SIGKILL)
    assert lives.wait(pids[1:]) == [-signal.SIGKILL]
    assert lives.run(tmp_path, *long, processes=2) == [0, 0]


SLOW_FIRST_UPDATE = """
import time
from kiem.training import signals
signals.HANG_SECONDS = 1.0
watch = signals.HangWatch(is_enabled=True)
for seconds in (0.5, 0, 0, 60):
    watch.begin()
    time.sleep(seconds)
    watch.end()
"""


def test_a_slow_first_update_gives_a_hang_no_more_time() -> None:
    command = [sys.executable, "-c", SLOW_FIRST_UPDATE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == ExitCode.HUNG
    assert "has not ended for 1 seconds" in done.stderr


# torch's wrapper of a model, freed later than the group of processes, can wait for ever.
PART = """
import weakref
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
made, destroy, reducers = DistributedDataParallel.__init__, dist.destroy_process_group, []
def make(self, *arguments, **options):
    made(self, *arguments, **options)
    reducers.append(weakref.ref(self.reducer))
def part():
    assert [reducer() for reducer in reducers] == [None]
    destroy()
DistributedDataParallel.__init__, dist.destroy_process_group = make, part
"""


def test_processes_part_when_nothing_holds_on_to_them(lives: Lives, tmp_path: Path) -> None:
    pids = lives.start(tmp_path, "--save-steps", "12", processes=2, patch=PART)
    wait_for_first_loss(tmp_path)
    os.kill(pids[0], signal.SIGTERM)
    assert lives.wait(pids) == 2 * [ExitCode.STOPPED], lives.log.read_text()[-3000:]
    codes = lives.run(tmp_path, "--save-steps", "12", processes=2, patch=PART)
    assert codes == [0, 0], lives.log.read_text()[-3000:]


def test_a_process_that_dies_ends_the_others_with_a_message(lives: Lives, tmp_path: Path) -> None:
    pids = lives.start(tmp_path, *SAVES, processes=2)
    said = len(lives.log.read_text())
    wait_for_first_loss(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    assert lives.wait(pids) == [ExitCode.PROCESS_LOST, -signal.SIGKILL]
    assert "another process has died" in lives.log.read_text()[said:]
    assert "Traceback" not in lives.log.read_text()[said:]


def torchrun(chunks: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += ["--max-restarts=3", "training.py", "--dataset-path", str(chunks)]
    words += ["--output-dir", str(output), *OPTIONS, *SAVES, *more]
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_torchrun_starts_again_when_a_process_is_killed(
    sample_chunks: Path, two: Undisturbed, tmp_path: Path
) -> None:
    """Without --run-name too: what a launcher starts again finds the run that it began."""
    chance = chaos("torchrun")
    for number in range(max(1, round(10 * SCALE))):
        output = tmp_path / str(number)
        program = torchrun(sample_chunks, output)
        wait_for(lambda output=output: [*output.glob("*/checkpoints/step-*")])
        victim = chance.choice(psutil.Process(program.pid).children())
        victim.kill()
        text, _ = program.communicate(timeout=300)
        assert program.returncode == 0, text
        (run,) = [path for path in output.iterdir() if not path.is_symlink()]
        assert "resuming from" in text
        assert outcome(run) == two[0]
