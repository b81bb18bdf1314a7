"""One program at a time in a folder, whatever becomes of the programs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from kiem.core.files import empty_folder, remove_folder
from kiem.core.locking import locked_folder

LOCK = ".a.lock"


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
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
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
            empty_folder(folder)
        else:
            folder.rename(tmp_path / "b")
    assert LOCK not in {path.name for path in tmp_path.iterdir()}
    with locked_folder(folder):
        assert not list(folder.iterdir())
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_the_end_of_a_lock_leaves_that_of_another(tmp_path: Path) -> None:
    """As when somebody has cleaned up by hand, and started again."""
    with contextlib.ExitStack() as new:
        with locked_folder(tmp_path / "a"):
            (tmp_path / LOCK).unlink()
            new.enter_context(locked_folder(tmp_path / "a"))
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
