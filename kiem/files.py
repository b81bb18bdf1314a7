"""The only place that writes files: all or nothing, and durable before it counts.

A file or folder appears under its final name in one rename, after its content has reached the
disk. A program killed at any moment leaves the old state or the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from io import BufferedIOBase, BufferedRandom
from pathlib import Path
from typing import Any

from kiem.errors import ExitCode, UserError

_READ_BLOCK_BYTES = 1 << 18
_SEAL_BYTES = hashlib.sha256().digest_size
_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return _sha256(file, None).hexdigest()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BufferedRandom]:
    """Fills a file out of sight and gives it its name in one rename.

    Yields:
        A temporary file, open for writing and reading. When the block raises, it is removed and
        `path` stays as it was.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with writing_errors(path):
        try:
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def sealed_file(path: Path) -> Iterator[BufferedRandom]:
    """As `new_file`, and puts the SHA-256 of what was written at the end, for `check_seal`."""
    with new_file(path) as file:
        yield file
        file.seek(0)
        file.write(_sha256(file, None).digest())


def check_seal(path: Path) -> bool:
    """Says whether a file of `sealed_file` is as it was written."""
    with path.open("rb") as file:
        content_bytes = os.fstat(file.fileno()).st_size - _SEAL_BYTES
        return content_bytes >= 0 and _sha256(file, content_bytes).digest() == file.read()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file in one atomic step; raises as `new_file`."""
    with new_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 text file in one atomic step; raises as `new_file`."""
    write_bytes(path, text.encode())


def to_json(value: Any) -> str:
    """Returns JSON as `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, indented, in one atomic step; raises as `new_file`."""
    write_text(path, to_json(value))


def append_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Appends objects as lines to a JSON Lines file: all, or none when the disk refuses.

    A kill can cut the last line; readers skip a cut line.
    """
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with writing_errors(path), path.open("ab") as file:
        start = file.tell()
        try:
            file.write(lines.encode())
            file.flush()
        except OSError:
            os.ftruncate(file.fileno(), start)
            raise


def fsync_file(path: Path) -> None:
    """Returns when a file's content has reached the disk."""
    with writing_errors(path), path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(
    path: Path, *, overwrite: bool = False, temporary: Path | None = None
) -> Iterator[Path]:
    """Fills a folder out of sight and gives it its name in one rename.

    Args:
        path: the final name.
        overwrite: whether a folder of that name is replaced; otherwise it must not exist.
        temporary: where it is filled, on the same disk; by default beside `path`.

    Yields:
        The temporary folder to write into. When the block raises, it is removed and
        `path` stays as it was.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    assert overwrite or not path.exists(), f"{path} exists"
    temporary = temporary or path.with_name(f".{path.name}.partial-{os.getpid()}")
    with writing_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    fsync_file(Path(folder, name))
                _fsync_folder(Path(folder))
            outgoing = _outgoing(path)
            shutil.rmtree(outgoing, ignore_errors=True)
            if path.exists():
                path.rename(outgoing)
            temporary.rename(path)
            _fsync_folder(path.parent)
            shutil.rmtree(outgoing, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Removes a file if it is there; raises a UserError if that cannot be done."""
    with writing_errors(path):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it where they are missing; raises a UserError if it cannot."""
    with writing_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder so that no half of it is ever seen under its name.

    Does nothing when it is not there, but for what a killed removal left of it.

    Raises:
        UserError: it cannot be removed.
    """
    outgoing = _outgoing(path)
    with writing_errors(path):
        shutil.rmtree(outgoing, ignore_errors=True)
        if path.exists():
            path.rename(outgoing)
            shutil.rmtree(outgoing)


def move_folder(path: Path, name: str) -> None:
    """Gives a folder another name beside its old one; a folder of that name is replaced."""
    target = path.with_name(name)
    with writing_errors(path):
        remove_folder(target)
        path.rename(target)
        _fsync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed programs left unfinished in a folder in which nobody else works."""
    with writing_errors(folder):
        for entry in [*folder.glob(".*.partial*"), *folder.glob(".*.old")]:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def is_removed(path: Path) -> bool:
    """Says whether nothing is left of a folder, not even by a killed removal."""
    return not path.exists() and not _outgoing(path).exists()


def _outgoing(path: Path) -> Path:
    """Where a folder waits for its end: one name, so that what a kill leaves is found again."""
    return path.with_name(f".{path.name}.old")


def empty_folder(path: Path) -> None:
    """Removes everything in a folder; raises a UserError if that cannot be done."""
    with writing_errors(path):
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def point_link(link: Path, target_name: str) -> None:
    """Makes `link` a relative symbolic link to its sibling `target_name`, in one atomic step."""
    temporary = link.with_name(f".{link.name}.partial-{os.getpid()}")
    with writing_errors(link):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target_name)
        temporary.replace(link)


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
    """Returns a number of bytes for people: '52.0 MB', in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


@contextlib.contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write into `UserError`s that name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                "the disk is full; nothing was written under this name",
                where=str(path),
                fix="Free some space, or choose a folder on another disk, and run it again.",
                exit_code=ExitCode.DISK_SPACE,
            ) from error
        if error.errno in _REFUSALS:
            is_whole = os.sep in str(error.filename)  # rmtree says only what it is called
            raise UserError(
                f"cannot write here ({error.strerror})",
                where=str(error.filename if is_whole else path),
                fix="Choose a place that exists and that you may write to.",
                exit_code=ExitCode.NOT_WRITABLE,
            ) from error
        if error.errno == errno.EIO:
            raise UserError(
                f"the disk failed ({error.strerror}); nothing was written under this name",
                where=str(path),
                fix="Check the disk, or choose a folder on another one, and run it again.",
                exit_code=ExitCode.NOT_WRITABLE,
            ) from error
        raise


def _sha256(file: BufferedIOBase, num_bytes: int | None) -> hashlib._Hash:
    """Hashes the next `num_bytes` of an open file, by default all that are left."""
    digest = hashlib.sha256()
    left = sys.maxsize if num_bytes is None else num_bytes
    block = memoryview(bytearray(_READ_BLOCK_BYTES))  # one for all: new memory costs more
    while num_read := file.readinto(block[: min(left, _READ_BLOCK_BYTES)]):
        digest.update(block[:num_read])
        left -= num_read
    return digest


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
