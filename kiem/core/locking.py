"""Locks on folders, for one program at a time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

from kiem.core.disk import discard, hidden, warn_once, writing_errors
from kiem.core.errors import already_exists
from kiem.core.files import make_folder

# The workers of a killed program hold its lock until their unit is finished: seconds.
_TRIES = 100
_PAUSE_SECONDS = 0.1


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Makes a folder if it is missing, and keeps out other programs that lock it.

    The lock ends with the process and its forked workers, however they end; that of
    `filelock.FileLock` would end with the process alone. A disk without locks gives a warning.

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
        with contextlib.suppress(OSError):  # it is closed in any case
            os.close(descriptor)


def _lock(file: Path, folder: Path) -> int:
    """Returns the descriptor of a locked file."""
    for _ in range(_TRIES):
        with writing_errors(folder):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                is_free = lock_descriptor(descriptor, blocking=False)
            except OSError as error:
                what = "this disk has no locks: do not start a second program on the same folder"
                warn_once(what, folder, error)
                is_free = True
            if is_free and _is_open_at(descriptor, file):  # its last holder removes the file
                return descriptor
            os.close(descriptor)
        time.sleep(_PAUSE_SECONDS)
    raise already_exists(
        str(folder),
        "another process is working here",
        "Wait until it is done, or choose another name.",
    )


def _is_open_at(descriptor: int, file: Path) -> bool:
    """Returns whether the open file is still the one of this name."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except OSError:
        return False
