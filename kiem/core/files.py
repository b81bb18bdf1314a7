"""Atomic and durable writes; the only place that writes files.

A file or folder appears under its final name in one step, after its content has reached the disk.
A program killed at any moment leaves the old state or the new one; `kiem.core.disk` removes
what it leaves beside them. What a disk refuses becomes a `UserError`, or a warning where the result
does not need it: see `kiem.core.disk`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from io import BufferedRandom, BufferedReader, FileIO
from pathlib import Path
from typing import Any

from kiem.core.disk import (
    discard,
    exchange,
    fsync,
    fsync_folder,
    hidden,
    remove,
    temporary_path,
    warn_once,
    writing_errors,
)
from kiem.core.errors import ExitCode, UserError

_READ_BLOCK_BYTES = 1 << 18
_SEAL_BYTES = hashlib.sha256().digest_size


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return _sha256(file).hexdigest()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BufferedRandom]:
    """Fills a temporary file and gives it its name in one rename.

    A link stays; the file that it points to is replaced.

    Yields:
        The temporary file, open for writing and reading. When the block raises, it is removed and
        `path` stays as it was.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    path = _behind_links(path)
    with writing_errors(path):
        temporary = temporary_path(path)
        try:
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                fsync(file.fileno(), path)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def check_new_file(path: Path) -> None:
    """Raises before long work what `new_file` would raise after it; leaves nothing behind."""
    path = _behind_links(path)
    with writing_errors(path):
        temporary = temporary_path(path)
        temporary.touch()
        temporary.unlink()


@contextlib.contextmanager
def sealed_file(path: Path) -> Iterator[BufferedRandom]:
    """As `new_file`, and appends the SHA-256 of what was written, for `check_seal`."""
    with new_file(path) as file:
        yield file
        file.seek(0)
        file.write(_sha256(file).digest())


def read_sealed(path: Path) -> bytes | None:
    """Returns what was written to a file of `sealed_file`; None if it is missing or damaged."""
    return path.read_bytes()[:-_SEAL_BYTES] if path.is_file() and check_seal(path) else None


def check_seal(path: Path) -> bool:
    """Returns whether a file of `sealed_file`, which may be large, is as it was written."""
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size - _SEAL_BYTES
        return num_bytes >= 0 and _sha256(file, num_bytes).digest() == file.read()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file in one atomic step; raises as `new_file`."""
    with new_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 text file in one atomic step; raises as `new_file`."""
    write_bytes(path, text.encode())


def to_json(value: Any) -> str:
    """Returns the text that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented, in one atomic step; raises as `new_file`."""
    write_text(path, to_json(value))


def append_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Appends objects as lines to a JSON Lines file: all, or none when the disk refuses.

    A kill can cut the last line. Readers skip a cut line; the next call removes it.
    """
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    with writing_errors(path):
        end: int | None = None
        try:
            with path.open("a+b", buffering=0) as file:
                end = _end_of_lines(file)
                file.truncate(end)
                while lines:
                    lines = lines[file.write(lines) :]
        except OSError:
            if end is not None:
                with contextlib.suppress(OSError):  # else the next call does it
                    os.truncate(path, end)
            raise


def fsync_file(path: Path) -> None:
    """Returns when a file's content has reached the disk."""
    with writing_errors(path), path.open("rb") as file:
        fsync(file.fileno(), path)


@contextlib.contextmanager
def new_folder(
    path: Path, *, overwrite: bool = False, temporary: Path | None = None
) -> Iterator[Path]:
    """Fills a temporary folder and gives it its name in one rename.

    Args:
        path: the final name.
        overwrite: whether a folder of that name is replaced; otherwise it must not exist.
        temporary: where it is filled, on the same disk; by default beside `path`.

    Yields:
        The temporary folder. When the block raises, it is removed and `path` stays as it was.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    assert overwrite or not os.path.lexists(path), f"{path} exists"
    with writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name that is too long is refused before the work, not after it
        temporary = temporary or temporary_path(path)
        remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, names in os.walk(temporary, onerror=_raise):
                for name in names:
                    fsync_file(Path(folder, name))
                fsync_folder(Path(folder))
            _put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(path.parent)
        discard(temporary)
        discard(hidden(path, "old"))


def remove_file(path: Path) -> None:
    """Removes a file if it is there; raises a UserError if that cannot be done."""
    with writing_errors(path):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it where they are missing; raises a UserError if it cannot."""
    with writing_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder, if it is there, so that no half of it is ever seen under its name.

    Raises:
        UserError: it cannot be removed.
    """
    with writing_errors(path):
        remove(hidden(path, "old"))
        remove(path)


def move_folder(path: Path, name: str) -> None:
    """Renames a folder; if the name is taken, to that name with a number."""
    with writing_errors(path):
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        path.rename(next(p for p in map(path.with_name, names) if not os.path.lexists(p)))
        fsync_folder(path.parent)


def empty_folder(path: Path) -> None:
    """Removes everything in a folder; raises a UserError if that cannot be done."""
    with writing_errors(path):
        for entry in path.iterdir():
            remove(entry)


def point_link(link: Path, target_name: str) -> None:
    """Makes `link` a relative symbolic link to its sibling `target_name`, in one atomic step.

    Some disks have no links, and nothing depends on this one: a refusal is only a warning.
    """
    with writing_errors(link):
        temporary = temporary_path(link)
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target_name)
            temporary.replace(link)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            warn_once("this link cannot be made; nothing else depends on it", link, error)


def require_free_space(
    folder: Path,
    needed_bytes: int,
    purpose: str,
    fix: str = "Free some space, or choose a folder on another disk with --output-dir.",
) -> None:
    """Checks that the disk that holds (or will hold) `folder` has room.

    Raises:
        UserError: fewer than `needed_bytes` bytes are free.
    """
    with writing_errors(folder):
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"too little disk space for {purpose}: about {format_bytes(needed_bytes)} needed, "
            f"{format_bytes(free_bytes)} free",
            where=str(folder),
            fix=fix,
            exit_code=ExitCode.DISK_SPACE,
        )


def format_bytes(num_bytes: float) -> str:
    """Returns a number of bytes to show, such as '52.0 MB', in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _behind_links(path: Path) -> Path:
    """Returns the file that a link points to; raises a UserError if it is not a regular file."""
    with writing_errors(path):
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):  # a device would become a file
                raise OSError(errno.EEXIST, "something else than a file has this name", str(path))
        return Path(os.path.realpath(path)) if path.is_symlink() else path


def _sha256(file: BufferedReader | BufferedRandom, num_bytes: int = sys.maxsize) -> hashlib._Hash:
    """Hashes the rest of an open file, or so many bytes of it."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_READ_BLOCK_BYTES))  # reused: new memory costs more
    while num_read := file.readinto(block[: min(num_bytes, len(block))]):
        digest.update(block[:num_read])
        num_bytes -= num_read
    return digest


def _end_of_lines(file: FileIO) -> int:
    """Returns where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _READ_BLOCK_BYTES)
        file.seek(start)
        line_end = file.read(end - start).rfind(b"\n")
        if line_end >= 0:
            return start + line_end + 1
        end = start
    return 0


def _put_in_place(temporary: Path, path: Path) -> None:
    """Gives a finished folder its name; what had the name before stays under a hidden one."""
    if not os.path.lexists(path):
        temporary.rename(path)
    elif not exchange(temporary, path):
        old = hidden(path, "old")
        discard(old)
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise


def _raise(error: OSError) -> None:
    raise error
