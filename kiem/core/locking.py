"""One program at a time in a folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

from kiem.core.disk import warn_once, writing_errors
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import make_folder
from kiem.core.leftovers import discard, hidden

# A killed parent's workers hold its lock for a second or two.
_LOCK_TRIES = 50
_LOCK_PAUSE_SECONDS = 0.1


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Makes a folder if need be and keeps other programs that lock it out.

    The lock ends with the process and those it forked, however they end. (`filelock.FileLock`
    would end with the process alone, whose workers may still be writing.) On a disk that has no
    locks there is a warning, and nobody is kept out.

    Raises:
        UserError: another process holds the lock, or the folder cannot be made.
    """
    # A file, since network disks lock only what is open for writing; beside the folder, since they
    # do not remove a folder in which a file is open.
    file = hidden(path, "lock")
    make_folder(path.parent)
    descriptor = _lock(file, path)
    try:
        make_folder(path)
        yield
    finally:
        if _is_open_at(descriptor, file):
            discard(file)
        with contextlib.suppress(OSError):  # it is closed, whatever the disk says
            os.close(descriptor)


def _lock(file: Path, folder: Path) -> int:
    """Returns the descriptor of a locked file."""
    for _ in range(_LOCK_TRIES):
        # The one that had the lock removes the file at its end.
        with writing_errors(folder):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            is_ours = False
            try:
                is_ours = _is_free(descriptor, folder) and _is_open_at(descriptor, file)
            finally:
                if not is_ours:
                    os.close(descriptor)
        if is_ours:
            return descriptor
        time.sleep(_LOCK_PAUSE_SECONDS)
    raise UserError(
        "another process is working here",
        where=str(folder),
        fix="Wait until it is done, or choose another name.",
        exit_code=ExitCode.ALREADY_EXISTS,
    )


def _is_free(descriptor: int, folder: Path) -> bool:
    """Takes the lock, or says that another process has it; a disk without locks has all free."""
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        what = "this disk has no locks: do not start a second program on the same folder"
        warn_once(what, folder, error)
        return True


def _is_open_at(descriptor: int, file: Path) -> bool:
    """Says whether the file that is open is still the one of this name."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except OSError:
        return False
