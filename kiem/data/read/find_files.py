"""Which files paths, folders and globs stand for; none is left out unsaid."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import MANIFEST_FILE
from kiem.data.read.formats import READABLE, format_of, is_metadata, shown_suffix
from kiem.data.read.rows import bad_input, reading_errors
from kiem.data.read.standard_input import STANDARD_INPUT, keep_standard_input
from kiem.tokenizer.tokenizer import TOKENIZER_FILE

_MOST_SUFFIXES_SHOWN = 8
_IN_CHUNK_DIRECTORIES = "in chunk directories"


@dataclass
class FoundFiles:
    """Files, and what there is beside them.

    Attributes:
        paths: the files, in the order in which they are read.
        names: what each is called in messages.
        not_read: how many others were found in folders and by globs, by suffix; those in chunk
            directories together.
    """

    paths: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    not_read: Counter[str] = field(default_factory=Counter)


def find_files(patterns: Sequence[str], option: str) -> FoundFiles:
    """Returns the files that paths, folders and globs stand for; "-" is standard input.

    Folders are read whole, but for hidden files and folders, whose names begin with a dot, and
    chunk directories, which are often made beside the text.

    Raises:
        UserError: there is no such file, one cannot be read, or one is named twice.
    """
    files = FoundFiles()
    for pattern in patterns:
        if pattern == STANDARD_INPUT:
            files.paths.append(keep_standard_input())
            files.names.append(STANDARD_INPUT)
            continue
        with reading_errors(f"{option} {pattern}"):
            paths, not_read = _expand(pattern, option)
            files.paths += paths
            files.names += map(str, paths)
            files.not_read += not_read
    folders: dict[Path, str] = {}
    counts = Counter(
        name if name == STANDARD_INPUT else _true_path(path, folders)
        for path, name in zip(files.paths, files.names, strict=True)
    )
    repeated = sorted(path for path, count in counts.items() if count > 1)
    if repeated:
        raise UserError(
            f"named twice: {', '.join(repeated)}",
            where=option,
            fix="Name each file once, so that its text does not count double.",
            exit_code=ExitCode.BAD_OPTION,
        )
    return files


def _true_path(path: Path, folders: dict[Path, str]) -> str:
    """Returns a file's path without links; `folders` keeps those of folders."""
    if path.is_symlink():
        return str(path.resolve())
    if path.parent not in folders:
        folders[path.parent] = str(path.parent.resolve())
    return f"{folders[path.parent]}/{path.name}"


def show_counts(not_read: Counter[str]) -> str:
    """Returns such as "3 files (.pdf 2, .docx 1)"."""
    common = sorted(not_read.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = ", ".join(f"{suffix} {count}" for suffix, count in common[:_MOST_SUFFIXES_SHOWN])
    more = ", ..." if len(common) > _MOST_SUFFIXES_SHOWN else ""
    total = not_read.total()
    return f"{total:,} {'file' if total == 1 else 'files'} ({shown}{more})"


def _expand(pattern: str, option: str) -> tuple[list[Path], Counter[str]]:
    """Returns the files to read, and how many others there are, by suffix."""
    path = Path(pattern)
    is_there = bool(pattern) and (path.exists() or path.is_symlink())  # Path("") is this folder
    if is_there and not path.is_dir():
        _check_file(path)
        return [path], Counter()
    if is_there:
        found = _walk(path)
    else:
        # A glob may give a folder and what is in it as well.
        matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        parts = [_walk(match) if match.is_dir() else [match] for match in matches]
        files = [file for part in parts for file in part]
        by_place = {(os.path.realpath(file.parent), file.name): file for file in files[::-1]}
        found = sorted(by_place.values())
    made = _in_chunk_directories(found)
    others = [path for path in found if path not in made]
    read = [path for path in others if not is_metadata(path.name) and format_of(path.name)]
    not_read = Counter(shown_suffix(path.name) for path in {*others}.difference(read))
    not_read[_IN_CHUNK_DIRECTORIES] += len(made)
    not_read = +not_read
    for path in read:
        _check_file(path)
    if not read:
        what = "has no file that can be read" if is_there else "no such file"
        raise UserError(
            f"{what}, but {show_counts(not_read)}" if not_read else what,
            where=f"{option} {pattern}",
            fix=f"Name existing files, or a folder with files that end in {READABLE}.",
            exit_code=ExitCode.NOT_FOUND,
        )
    return read, not_read


def _in_chunk_directories(found: list[Path]) -> set[Path]:
    """Returns those of the files that preprocess.py made."""
    manifests = [path for path in found if path.name == MANIFEST_FILE]
    folders = {path.parent for path in manifests if path.with_name(TOKENIZER_FILE).is_file()}
    return {path for path in found if folders.intersection(path.parents)} if folders else set()


def _walk(folder: Path) -> list[Path]:
    """Returns the files in a folder and in those below it, in order, each folder once."""
    found = []
    seen = set()

    def refuse(error: OSError) -> None:
        with reading_errors(str(error.filename)):
            raise error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(place).stat()
        is_new = (status.st_dev, status.st_ino) not in seen
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        found += [Path(place, n) for n in names if is_new and not n.startswith(".")]
    return sorted(found)


def _check_file(path: Path) -> None:
    """Raises a UserError if the path is not one of a file that can be read."""
    text = str(path)
    odd = () if text.isprintable() else {unicodedata.category(character) for character in text}
    if {"Cc", "Cs", "Zl", "Zp"}.intersection(odd):
        what = "the file's name has a line break, a control character or bytes that are not UTF-8"
        raise bad_input(ascii(text), what, "Rename it.")
    if not path.is_file():
        is_dangling = path.is_symlink() and not path.exists()
        what = "is a link to a file that is not there" if is_dangling else "is not a regular file"
        fix = "Remove it, or name only files. Text from a pipe is read from standard input: -"
        raise bad_input(str(path), what, fix)
    if format_of(path.name) is None:
        raise bad_input(str(path), "unknown type of file", f"Files must end in {READABLE}.")
