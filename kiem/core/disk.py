"""Errors of the disk: a `UserError` where the work needs the disk, else a warning."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from kiem.core.errors import ExitCode, UserError, bad_option

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# How network disks, FUSE and containers report that they lack a function.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FSYNC = (*_NOT_SUPPORTED, errno.EBADF)
_NO_EXCHANGE = (*_NOT_SUPPORTED, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILED = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.ELOOP)  # the first also for a broken link
_warned: set[str] = set()


class DiskWarning(UserWarning):
    """The disk lacks something that the result does not need; `kiem.cli.run` prints it."""


def warn_once(what: str, where: Path, error: OSError) -> None:
    """Warns that the disk refused something, once in a process for each `what`."""
    if what not in _warned:
        _warned.add(what)
        warnings.warn(f"{where}: {what} ({_reason(error)})", DiskWarning, stacklevel=3)


@contextlib.contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turns every refusal to write into a `UserError` that names `path` and the reason.

    A pipe or socket that its reader closed is no fault of the disk; that error passes.
    """
    try:
        is_possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_possible = False
    if not is_possible:
        fix = "Choose a name of valid characters, without NUL."
        raise bad_option(ascii(str(path)), "no file can have this name", fix)
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        raise _explain(error, path) from error


def fsync(descriptor: int, path: Path) -> None:
    """Returns when an open file or folder has reached the disk; warns if the disk cannot tell."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        warn_once("this disk does not say when files are safe from a power failure", path, error)


def fsync_folder(path: Path) -> None:
    """Returns when the names in a folder have reached the disk; warns if the disk cannot tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError as error:  # one may write into it, but not read it
        warn_once("this folder cannot be made safe from a power failure", path, error)
        return
    try:
        fsync(descriptor, path)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; returns False after a warning where that is not possible."""
    names = os.fsencode(first), os.fsencode(second)
    libc = ctypes.CDLL(None, use_errno=True)
    number = errno.ENOSYS
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return True
        number = ctypes.get_errno()
    error = OSError(number, os.strerror(number), str(first), None, str(second))
    if number not in _NO_EXCHANGE:
        raise error
    what = "two folders cannot be swapped here; the next start repairs a kill in between"
    warn_once(what, second, error)
    return False


def _explain(error: OSError, path: Path) -> UserError:
    what = f"cannot write here ({_reason(error)})"
    fix = "Correct the cause, or choose a place that exists and that you may write to."
    if error.errno in _FULL:
        what = "the disk is full" if error.errno == errno.ENOSPC else "your disk quota is used up"
        fix = "Free some space, or choose a folder on another disk."
    elif error.errno in _FAILED:
        what = f"the disk failed ({_reason(error)})"
        fix = "Check the disk and its connection, or choose a folder on another one."
    elif error.errno in _IN_THE_WAY:
        fix = "A file or a broken link is in the way: remove it, or choose another name."
    # The file that the error names, but never a temporary name beside `path`; `shutil.rmtree` gives
    # only a name within a folder.
    named = Path(error.filename) if isinstance(error.filename, str) else path
    where = named if named.name != str(named) and named.parent != path.parent else path
    exit_code = ExitCode.DISK_SPACE if error.errno in _FULL else ExitCode.NOT_WRITABLE
    return UserError(what, where=str(where), fix=fix, exit_code=exit_code)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
