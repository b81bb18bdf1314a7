"""What a disk refuses: an error becomes a message, what the result can do without a warning."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from kiem.core.errors import ExitCode, UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# How network and FUSE disks, and containers, say that they have no such thing.
_NOT_THERE = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FSYNC = (*_NOT_THERE, errno.EBADF)
_NO_EXCHANGE = (*_NOT_THERE, errno.EPERM)
_warned: set[str] = set()  # a disk that cannot do something cannot do it a thousand times


class DiskWarning(UserWarning):
    """The disk cannot do something that the result does not need; `kiem.cli.run` shows it."""


def warn_once(what: str, where: Path, error: OSError) -> None:
    """Warns that the disk has refused something, once in a process for each `what`."""
    if what not in _warned:
        _warned.add(what)
        warnings.warn(f"{where}: {what} ({_reason(error)})", DiskWarning, stacklevel=3)


@contextlib.contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turns every refusal to write into a `UserError` that names `path` and the reason.

    The reader of a pipe or socket that has gone away is no matter of the disk and passes.
    """
    _check_name(path)
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        what, fix, exit_code = _explain(error)
        where = str(_place(error, path))
        raise UserError(what, where=where, fix=fix, exit_code=exit_code) from error


def fsync(descriptor: int, path: Path) -> None:
    """Returns when an open file or folder has reached the disk; warns if the disk cannot say."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        warn_once("this disk does not say when files are safe from a power failure", path, error)


def fsync_folder(path: Path) -> None:
    """Returns when the names in a folder have reached the disk; warns if the disk cannot say."""
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
    what = "two folders cannot be swapped here; a kill in between is mended at the next start"
    warn_once(what, second, error)
    return False


def _check_name(path: Path) -> None:
    try:
        is_possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_possible = False
    if not is_possible:
        raise UserError(
            "no file can have this name",
            where=ascii(str(path)),
            fix="Choose a name without NUL and other characters that are no text.",
            exit_code=ExitCode.BAD_OPTION,
        )


def _place(error: OSError, path: Path) -> Path:
    """Returns what the refusal is about, but never a temporary name beside `path`."""
    if not isinstance(error.filename, str) or os.sep not in error.filename:
        return path  # rmtree says only what a file is called inside its folder
    named = Path(error.filename)
    return path if named.parent == path.parent else named


def _explain(error: OSError) -> tuple[str, str, ExitCode]:
    """Returns what is wrong, what to do about it, and the exit code."""
    reason, other = _reason(error), "Choose a folder on another disk, and run it again."
    match error.errno:
        case errno.ENOSPC:
            fix = "Free some space, or choose a folder on another disk, and run it again."
            return "the disk is full", fix, ExitCode.DISK_SPACE
        case errno.EDQUOT:
            fix = "Remove something of yours, or choose a folder on another disk."
            return f"the disk is full for you ({reason})", fix, ExitCode.DISK_SPACE
        case errno.EFBIG:
            what = f"the disk or a limit (ulimit -f) does not allow so large a file ({reason})"
            return what, other, ExitCode.NOT_WRITABLE
        case errno.EIO | errno.ENXIO | errno.ENODEV | errno.ESTALE | errno.ETIMEDOUT:
            fix = "Check the disk and its connection, or choose a folder on another one."
            return f"the disk failed ({reason})", fix, ExitCode.NOT_WRITABLE
        case errno.EEXIST | errno.ENOTDIR | errno.ELOOP:  # EEXIST: also a link that leads nowhere
            fix = "A file or a broken link is in the way: remove it, or choose another name."
        case errno.EMFILE | errno.ENFILE:
            fix = "Allow more open files: ulimit -n."
        case errno.ENAMETOOLONG:
            fix = "Choose a shorter name."
        case errno.EBUSY | errno.ETXTBSY | errno.EAGAIN | errno.EDEADLK:
            fix = "Wait until no other program uses it, or choose another name."
        case _:
            fix = "Choose a place that exists and that you may write to."
    return f"cannot write here ({reason})", fix, ExitCode.NOT_WRITABLE


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
