"""Hidden files beside those that kiem writes, and their removal after a kill.

.NAME.partial-...   being filled; the next program that writes into the folder removes it
.NAME.removed       being removed
.NAME.lock          of `kiem.core.locking`
.NAME.old           whole: what had the name, on a disk that cannot swap two names, for the moment
                    in which it is replaced
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import zlib
from pathlib import Path

import psutil

from kiem.core.disk import warn_once, writing_errors

# Longer names are hidden under their hash: some disks allow 143 bytes, suffix included.
_LONGEST_BYTES = 100


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


def recover_folder(path: Path) -> Path:
    """Restores a folder if its replacement was killed on a disk that cannot swap two names.

    Returns:
        The same path.

    Raises:
        UserError: it cannot be restored.
    """
    if not path.name:  # "." is always there
        return path
    old = hidden(path, "old")
    if os.path.lexists(old) and not os.path.lexists(path):
        with writing_errors(path):
            old.rename(path)
    return path


def remove_leftovers(folder: Path) -> None:
    """Repairs what killed programs left in a folder in which no other program works."""
    with writing_errors(folder):
        for entry in folder.glob(".*.old"):
            recover_folder(entry.with_name(entry.name[1 : -len(".old")]))
            discard(entry)
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
