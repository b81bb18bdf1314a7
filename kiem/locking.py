"""One program at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from kiem.errors import ExitCode, UserError
from kiem.files import make_folder, writing_errors

# A killed parent's workers hold its lock for a second or two.
_LOCK_TRIES = 50
_LOCK_PAUSE_SECONDS = 0.1


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Makes a folder if need be and keeps other programs that lock it out.

    The lock ends with the process and those it forked, however they end.

    Raises:
        UserError: another process holds the lock, or the folder cannot be made.
    """
    descriptor = -1
    try:
        with writing_errors(path):
            for _ in range(_LOCK_TRIES):
                make_folder(path)
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # The one that had the lock may have removed the folder at its end.
                    if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                        break
                os.close(descriptor)
                descriptor = -1
                time.sleep(_LOCK_PAUSE_SECONDS)
        if descriptor == -1:
            raise UserError(
                "another process is working here",
                where=str(path),
                fix="Wait until it is done, or choose another name.",
                exit_code=ExitCode.ALREADY_EXISTS,
            )
        yield
    finally:
        if descriptor != -1:
            os.close(descriptor)
