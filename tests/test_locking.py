"""One program at a time in a folder, whatever becomes of the programs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from kiem.files import empty_folder, remove_folder
from kiem.locking import LOCK_FILE, locked_folder


def test_the_lock_ends_with_the_last_worker(tmp_path: Path) -> None:
    """A killed program's workers may still be writing, so nobody else begins before they end."""
    folder = tmp_path / "a"
    begun, begins = os.pipe()
    program = os.fork()
    if program == 0:
        with locked_folder(folder):
            if os.fork() == 0:
                os.write(begins, b"x")
                time.sleep(0.5)
                (folder / "worked").write_text("")
                os._exit(0)
            signal.pause()
    assert os.read(begun, 1)
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    with locked_folder(folder):
        assert (folder / "worked").exists()
    assert [path.name for path in folder.iterdir()] == ["worked"]
    os.close(begun)
    os.close(begins)


@pytest.mark.parametrize("end", ["removes the folder", "empties it", "moves it away"])
def test_the_holder_may_do_anything_with_the_folder(end: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with locked_folder(folder):
        (folder / "x").write_text("")
        if end == "removes the folder":
            remove_folder(folder)
        elif end == "empties it":
            empty_folder(folder, keep=LOCK_FILE)
        else:
            shutil.move(folder, tmp_path / "b")
    with locked_folder(folder):
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    assert not list(folder.iterdir())


def test_the_end_of_a_lock_leaves_that_of_others(tmp_path: Path) -> None:
    """As when a folder was removed and made again, and the new one is locked by another."""
    with contextlib.ExitStack() as new:
        with locked_folder(tmp_path / "a"):
            remove_folder(tmp_path / "a")
            new.enter_context(locked_folder(tmp_path / "a"))
        assert (tmp_path / "a" / LOCK_FILE).exists()
    assert not (tmp_path / "a" / LOCK_FILE).exists()
