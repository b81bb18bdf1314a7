"""What killed programs leave beside the files and folders that they wrote, and putting it right.

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

# Longer names are hidden under their hash: some disks allow 143 bytes, and something is added.
_LONGEST_BYTES = 100


def hidden(path: Path, suffix: str) -> Path:
    """Returns the hidden name under which something of a file or folder waits beside it."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return path.with_name(f".{name}.{suffix}")


def temporary_path(path: Path) -> Path:
    """Returns where a file or folder is filled, and removes what killed programs left there."""
    _clean(path.parent)
    return hidden(path, f"partial-{_machine()}-{os.getpid()}")


def recover_folder(path: Path) -> Path:
    """Puts back a folder whose replacement was killed on a disk that cannot swap two names.

    Returns:
        The same path, so that whoever wants to know what is there can ask for it in one go.

    Raises:
        UserError: it cannot be put back.
    """
    if not path.name:  # "." is always there
        return path
    old = hidden(path, "old")
    if os.path.lexists(old) and not os.path.lexists(path):
        with writing_errors(path):
            old.rename(path)
    return path


def remove_leftovers(folder: Path) -> None:
    """Puts right what killed programs left in a folder in which nobody else works."""
    with writing_errors(folder):
        for entry in folder.glob(".*.old"):
            path = recover_folder(entry.with_name(entry.name[1 : -len(".old")]))
            discard(entry, path)
        for entry in [*folder.glob(".*.partial*"), *folder.glob(".*.removed")]:
            remove_entry(entry)


def is_removed(path: Path) -> bool:
    """Says whether nothing is left of a folder, not even by a killed removal."""
    beside = (hidden(path, suffix) for suffix in ("old", "removed", "lock"))
    return not any(map(os.path.lexists, (path, *beside)))


def take_away(entry: Path, path: Path) -> Path:
    """Renames what is to be removed, so that no half of it is ever seen under its name.

    Args:
        entry: a file or folder, which need not be there.
        path: the name that it has or had.

    Returns:
        Where it waits for its end: one name, so that what a kill leaves is found again.
    """
    removed = hidden(path, "removed")
    remove_entry(removed)
    if os.path.lexists(entry):
        entry.rename(removed)
    return removed


def remove_entry(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(entry: Path, path: Path | None = None) -> None:
    """Removes what nobody needs any more, if it is there; a refusal is only a warning.

    Args:
        entry: a file or folder.
        path: the name that it has or had, if half of it must not be seen under it.
    """
    try:
        remove_entry(entry if path is None else take_away(entry, path))
    except OSError as error:
        warn_once("what is not needed any more cannot be removed", entry, error)


@functools.lru_cache(maxsize=1000)  # once in a program, however many files it writes there
def _clean(folder: Path) -> None:
    """Removes what killed programs of this machine left unfinished in a folder."""
    machine = _machine()
    with contextlib.suppress(OSError):  # what is wrong there, writing will say
        for entry in folder.iterdir() if machine else ():
            found = re.fullmatch(rf"\..+\.partial-{machine}-(\d+)", entry.name)
            if found and not psutil.pid_exists(int(found[1])):
                remove_entry(entry)


@functools.cache
def _machine() -> str:
    """Returns what tells the process ids of this machine or container from those of others.

    Empty where the system does not say; then nothing is taken for the work of a dead program.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        return f"{zlib.crc32(boot + os.fsencode(Path('/proc/self/ns/pid').readlink())):08x}"
    except OSError:
        return ""
