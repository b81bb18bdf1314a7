"""Disks that fail in the middle of a save, or fill up in the middle of a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Disk
from disk_shim import compile_shim
from lives import Lives, outcome

from kiem.core.errors import ExitCode
from kiem.training.checkpoint import list_checkpoints, verify_checkpoint

# Before the second checkpoint the disk is filled up, but for some room.
FILL = """
import shutil
from kiem.training import loop
save_checkpoint = loop.save_checkpoint
def save(folder, *others):
    if list(folder.glob("step-*")):
        with open({full!r}, "wb", buffering=0) as file:
            for _ in range((shutil.disk_usage({full!r}).free - {room}) // 4096):
                file.write(bytes(4096))
    return save_checkpoint(folder, *others)
loop.save_checkpoint = save
"""


NO_LINKS = """
import errno, os
def refuse(*_, **__):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
os.symlink = refuse
"""


@pytest.mark.slow
def test_every_call_of_a_save_may_fail(tmp_path: Path) -> None:
    library = compile_shim(tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "faults_program.py", library, tmp_path / "checkpoints"],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["write", "fsync", "rename"]


def test_a_disk_that_fills_up(lives: Lives, disk: Disk, tmp_path: Path) -> None:
    disk.remount("size=100M")
    run, full = disk.path / "run", disk.path / "full"
    adamw = ("--optimizer", "adamw")  # two moments of every weight
    assert lives.run(tmp_path, *adamw) == [0], lives.log.read_text()
    expected = outcome(tmp_path / "run")

    # Room for the model, not for a checkpoint: the run comes to its end, if it may.
    fill = FILL.format(full=str(full), room=9_000_000)
    assert lives.run(disk.path, *adamw, patch=fill) == [0], lives.log.read_text()
    said = lives.log.read_text()
    assert f"{run}/checkpoints/.step-6.partial/" in said
    assert "checkpoint of step 6, up to 18." in said
    assert "the disk is full; training goes on" in said
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    verify_checkpoint(checkpoint)
    found = outcome(run)
    assert found["metrics"] == expected["metrics"]
    model = "final_model/model.safetensors"
    assert found[model] == expected[model]

    # No room for anything: the log's lines wait, and at the end there is a message.
    full.unlink()
    shutil.rmtree(run)
    stop = ("--on-save-failure", "stop")
    for options, room in (((), 0), (stop, 9_000_000)):
        fill = FILL.format(full=str(full), room=room)
        assert lives.run(disk.path, *adamw, *options, patch=fill) == [ExitCode.DISK_SPACE]
        assert not (run / "final_model").exists()
        verify_checkpoint(list_checkpoints(run / "checkpoints")[-1])
        full.unlink()
    assert "its lines wait in memory" in lives.log.read_text()
    assert lives.run(disk.path, *adamw) == [0], lives.log.read_text()
    assert outcome(run) == expected

    # Too small from the beginning.
    shutil.rmtree(run)
    disk.remount("size=70M")
    assert lives.run(disk.path, *adamw) == [ExitCode.DISK_SPACE]
    assert "too little disk space for the model and 4 checkpoints" in lives.log.read_text()

    # Large enough for a run that makes fewer; without links, the run is whole all the same.
    few = ("--max-steps", "1", "--save-steps", "1")
    assert lives.run(disk.path, *adamw, *few, patch=NO_LINKS) == [0], lives.log.read_text()
    link = disk.path / "gemma3-micro-dutch-latest"
    said = f"warning: {link}: this link cannot be made; nothing else depends on it"
    assert lives.log.read_text().count(f"{said} (Operation not permitted)") == 1
    assert (run / "final_model" / "manifest.json").exists()
