"""The files that paths, folders, globs and "-" stand for; what is left out is counted."""

from __future__ import annotations

import atexit
import glob
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

from kiem.core.disk import writing_errors
from kiem.core.errors import bad_input, bad_option, not_found
from kiem.core.manifest import MANIFEST_FILE
from kiem.data.read.formats import METADATA, READABLE, format_of, shown_suffix
from kiem.data.read.source_file import STANDARD_INPUT, reading_errors
from kiem.tokenizer.tokenizer import TOKENIZER_FILE

_MOST_SUFFIXES_SHOWN = 8
_IN_CHUNK_DIRECTORIES = "in chunk directories"
_BAD_IN_NAMES = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def find_files(patterns: Sequence[str], option: str) -> tuple[list[tuple[Path, str]], Counter[str]]:
    """Finds the files that paths, folders and globs stand for; "-" is standard input.

    Of folders everything is read except hidden files and folders, whose names begin with a dot,
    and chunk directories, which are often beside the text.

    Returns:
        The files in reading order, each with its name in messages; and the number of other files
        that folders and globs have, by suffix.

    Raises:
        UserError: there is no such file, one cannot be read, or one is named twice.
    """
    files: list[tuple[Path, str]] = []
    not_read: Counter[str] = Counter()
    for pattern in patterns:
        if pattern == STANDARD_INPUT:
            files.append((_keep_standard_input(), STANDARD_INPUT))
            continue
        with reading_errors(f"{option} {pattern}"):
            paths, others = _expand(pattern, option)
            for path in paths:
                _check_file(path)
                files.append((path, str(path)))
            not_read += others
    counts = Counter(
        name if name == STANDARD_INPUT else os.path.realpath(path) for path, name in files
    )
    if repeated := sorted(path for path, count in counts.items() if count > 1):
        fix = "Name each file once, so that its text does not count double."
        raise bad_option(option, f"named twice: {', '.join(repeated)}", fix)
    return files, not_read


def show_counts(not_read: Counter[str]) -> str:
    """Returns text such as "3 files (.pdf 2, .docx 1)"."""
    common = sorted(not_read.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = ", ".join(f"{suffix} {count}" for suffix, count in common[:_MOST_SUFFIXES_SHOWN])
    more = ", ..." if len(common) > _MOST_SUFFIXES_SHOWN else ""
    total = not_read.total()
    return f"{total:,} {'file' if total == 1 else 'files'} ({shown}{more})"


@cache
def _keep_standard_input() -> Path:
    """Copies standard input into a temporary file and returns a path that opens it.

    It is read in parallel and more than once, also for several options. On Linux the file has no
    name, and disappears when this process and its forks have ended, however they end.
    """
    folder = Path(tempfile.gettempdir())
    is_linux = sys.platform == "linux"
    with writing_errors(folder), tempfile.NamedTemporaryFile(dir=folder, delete=is_linux) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        if is_linux:
            return Path(f"/proc/self/fd/{os.dup(file.fileno())}")
        # Openings of macOS's /dev/fd have one position in common.
        atexit.register(os.unlink, file.name)
        return Path(file.name)


def _expand(pattern: str, option: str) -> tuple[list[Path], Counter[str]]:
    """Returns the files to read, and how many others there are, by suffix."""
    path = Path(pattern)
    is_there = bool(pattern) and (path.exists() or path.is_symlink())  # Path("") is this folder
    if is_there and not path.is_dir():
        return [path], Counter()
    matches = [path] if is_there else sorted(map(Path, glob.glob(pattern, recursive=True)))
    files = [file for m in matches for file in (_walk(m) if m.is_dir() else [m])]
    # A glob may match a folder and what is in it as well.
    by_place = {(os.path.realpath(file.parent), file.name): file for file in files[::-1]}
    found = sorted(by_place.values())
    made = _in_chunk_directories(found)
    others = [path for path in found if path not in made]
    read = [path for path in others if path.name not in METADATA and format_of(path.name)]
    not_read = Counter(shown_suffix(path.name) for path in {*others}.difference(read))
    not_read += Counter({_IN_CHUNK_DIRECTORIES: len(made)})
    if not read:
        what = "has no file that can be read" if is_there else "no such file"
        what += f", but {show_counts(not_read)}" if not_read else ""
        fix = f"Name existing files, or a folder with files that end in {READABLE}."
        raise not_found(f"{option} {pattern}", what, fix)
    return read, not_read


def _in_chunk_directories(found: list[Path]) -> set[Path]:
    """Returns the files that belong to chunk directories."""
    manifests = [path for path in found if path.name == MANIFEST_FILE]
    folders = {path.parent for path in manifests if path.with_name(TOKENIZER_FILE).is_file()}
    return {path for path in found if folders.intersection(path.parents)} if folders else set()


def _walk(folder: Path) -> list[Path]:
    """Returns the files in a folder and in those below it, in order, each folder once."""
    found = []
    seen = set()

    def refuse(error: OSError) -> NoReturn:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(place).stat()
        is_new = (status.st_dev, status.st_ino) not in seen
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        found += [Path(place, n) for n in names if is_new and not n.startswith(".")]
    return sorted(found)


def _check_file(path: Path) -> None:
    """Raises a UserError if the path is not a file that can be read."""
    text = str(path)
    if _BAD_IN_NAMES.search(text):
        what = "the file's name has a line break, a control character or bytes that are not UTF-8"
        raise bad_input(ascii(text), what, "Rename it.")
    if not path.is_file():
        fix = "Remove it, or name only files. Text from a pipe is read from standard input: -"
        raise bad_input(text, "is not a regular file, nor a link to one", fix)
    if format_of(path.name) is None:
        raise bad_input(text, "unknown type of file", f"Files must end in {READABLE}.")
