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
_CANNOT_WRITE = "cannot write here ({reason})"
_CAUSES = (
    ((errno.ENOSPC,), "the disk is full", "Free some space, or choose a folder on another disk."),
    (
        (errno.EDQUOT,),
        "your quota on this disk is used up ({reason})",
        "Remove some of your files, or choose a folder on another disk.",
    ),
    (
        (errno.EFBIG,),
        "the disk or a limit (ulimit -f) does not allow so large a file ({reason})",
        "Choose a folder on another disk, or raise the limit.",
    ),
    (
        (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT),
        "the disk failed ({reason})",
        "Check the disk and its connection, or choose a folder on another one.",
    ),
    (
        (errno.EEXIST, errno.ENOTDIR, errno.ELOOP),  # the first also for a broken link
        _CANNOT_WRITE,
        "A file or a broken link is in the way: remove it, or choose another name.",
    ),
    ((errno.EMFILE, errno.ENFILE), _CANNOT_WRITE, "Allow more open files: ulimit -n."),
    ((errno.ENAMETOOLONG,), _CANNOT_WRITE, "Choose a shorter name."),
    (
        (errno.EBUSY, errno.ETXTBSY, errno.EAGAIN, errno.EDEADLK),
        _CANNOT_WRITE,
        "Wait until no other program uses it, or choose another name.",
    ),
)
_OTHER_FIX = "Choose a place that exists and that you may write to."
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
    what, fix = _CANNOT_WRITE, _OTHER_FIX
    for numbers, *found in _CAUSES:
        if error.errno in numbers:
            what, fix = found
    # The file that the error names, but never a temporary name beside `path`; `shutil.rmtree` gives
    # only a name within a folder.
    named = Path(error.filename) if isinstance(error.filename, str) else path
    if os.sep in str(named) and named.parent != path.parent:
        path = named
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    exit_code = ExitCode.DISK_SPACE if is_full else ExitCode.NOT_WRITABLE
    return UserError(
        what.format(reason=_reason(error)), where=str(path), fix=fix, exit_code=exit_code
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
