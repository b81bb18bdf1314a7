"""What a disk refuses, and what killed programs leave on it.

A refusal is a `UserError` where the work needs the disk, else a warning. Beside the files that kiem
writes there can be hidden ones:

.NAME.partial-...   being filled; the next program that writes into the folder removes it
.NAME.removed       being removed
.NAME.lock          of `kiem.core.locking`
.NAME.old           what had the name, while it is replaced on a disk that cannot swap two names
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from kiem.core.errors import ExitCode, UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# How network disks, FUSE and containers report that they lack a function.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FSYNC = (*_NOT_SUPPORTED, errno.EBADF)
_NO_EXCHANGE = (*_NOT_SUPPORTED, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Longer names are hidden under their hash: some disks allow 143 bytes, suffix included.
_LONGEST_BYTES = 100
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
    if hasattr(libc, "renameat2"):  # not on macOS, nor with an old glibc
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return True
        number = ctypes.get_errno()
    error = OSError(number, os.strerror(number), str(first), None, str(second))
    if number not in _NO_EXCHANGE:
        raise error
    what = "two folders cannot be swapped here; after a kill in between the old one is .NAME.old"
    warn_once(what, second, error)
    return False


def hidden(path: Path, suffix: str) -> Path:
    """Returns the hidden name beside a file or folder for something that belongs to it."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return path.with_name(f".{name}.{suffix}")


def temporary_path(path: Path) -> Path:
    """Returns where a file or folder is filled, and removes what killed programs left there."""
    _remove_partial(path.parent)
    return hidden(path, f"partial-{_machine()}-{os.getpid()}")


def remove_leftovers(folder: Path) -> None:
    """Removes what killed programs left in a folder in which no other program works."""
    with writing_errors(folder):
        for entry in [*folder.glob(".*.partial*"), *folder.glob(".*.removed")]:
            remove(entry)


def is_removed(path: Path) -> bool:
    """Returns whether nothing is left of a folder, not even by a killed removal."""
    return not any(map(os.path.lexists, (path, hidden(path, "removed"), hidden(path, "lock"))))


def remove(path: Path) -> None:
    """Removes what has a name, if anything, so that no half of a folder is ever seen under it."""
    removed = hidden(path, "removed")
    if removed.exists():
        shutil.rmtree(removed)
    if path.is_dir() and not path.is_symlink():
        path.rename(removed)
        shutil.rmtree(removed)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Removes what is no longer needed; a refusal is only a warning."""
    try:
        remove(path)
    except OSError as error:
        warn_once("what is no longer needed cannot be removed", path, error)


def _explain(error: OSError, path: Path) -> UserError:
    if error.errno in _FULL:
        what = "the disk is full" if error.errno == errno.ENOSPC else "your disk quota is used up"
        fix = "Free some space, or choose a folder on another disk."
    else:
        what = f"cannot write here ({_reason(error)})"
        fix = "Correct the cause, or choose a place that exists and that you may write to."
    # The file that the error names, but never a temporary name beside `path`; `shutil.rmtree` gives
    # only a name within a folder.
    named = Path(error.filename) if isinstance(error.filename, str) else path
    where = named if named.name != str(named) and named.parent != path.parent else path
    exit_code = ExitCode.DISK_SPACE if error.errno in _FULL else ExitCode.NOT_WRITABLE
    return UserError(what, where=str(where), fix=fix, exit_code=exit_code)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@functools.lru_cache(maxsize=1000)  # once in a program, however many files it writes there
def _remove_partial(folder: Path) -> None:
    """Removes what killed programs of this machine left unfinished in a folder."""
    machine = _machine()
    with contextlib.suppress(OSError):  # writing reports what is wrong there
        for entry in folder.iterdir() if machine else ():
            found = re.fullmatch(rf"\..+\.partial-{machine}-(\d+)(\.removed)?", entry.name)
            if found and not psutil.pid_exists(int(found[1])):
                remove(entry)


@functools.cache
def _machine() -> str:
    """Returns an id of the machine or container to which process ids belong.

    Empty where the system does not tell; then no file counts as left by a dead program.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        return f"{zlib.crc32(boot + os.fsencode(Path('/proc/self/ns/pid').readlink())):08x}"
    except OSError:
        return ""
