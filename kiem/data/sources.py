"""Where text comes from: the files of the Hub dataset, local files or the built-in sample."""

from __future__ import annotations

import glob
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from kiem.config import DATASET_SIZES, HUB_DATASET
from kiem.data.hub import download_dataset_files
from kiem.data.rows import bad_input, reading_errors
from kiem.errors import ExitCode, UserError
from kiem.files import sha256_file

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
DEFAULT_HUB_SIZE = "10k"
_WORD_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A resolved source: files in the order they are read, and what identifies them.

    Attributes:
        name: short name, used for the chunk directory.
        paths: the files.
        names: what each file is called in messages and in the manifest.
        description: what the manifest records: kind, revision or the sha256 of every file.
        stamps: size and time of each file, by which a later change is noticed.
    """

    name: str
    paths: list[Path]
    names: list[str]
    description: dict[str, Any]
    stamps: list[tuple[int, int]]


def file_stamp(path: Path) -> tuple[int, int]:
    """Returns what changes when a file is written to: its size and the time of its last change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def resolve_source(
    source: tuple[str, ...],
    dataset_size: str | None,
    *,
    revision: str | None = None,
    console: Console | None = None,
    option: str = "--source",
) -> Source:
    """Finds (and for the Hub, downloads) the files that an option names.

    Args:
        source: ("hub",), ("sample",), or files, folders and globs.
        dataset_size: the Hub dataset's config; not looked at for other sources.
        revision: the Hub dataset's commit, by default the newest.
        console: where the progress of a download is shown.
        option: the option's name, for messages.

    Raises:
        UserError: unknown size, no such file, a file that cannot be read, or trouble with the Hub.
    """
    if source == ("hub",):
        return _resolve_hub(dataset_size or DEFAULT_HUB_SIZE, revision, console)
    if source == ("sample",):
        path = Path(str(resources.files("kiem.data") / "sample" / "dutch.jsonl"))
        return local_source("sample", "sample", [path], ["sample"])
    if "hub" in source or "sample" in source:
        raise UserError(
            "'hub' and 'sample' stand alone",
            where=option,
            fix="Give either one of them, or files.",
            exit_code=ExitCode.BAD_OPTION,
        )
    paths = [path for pattern in source for path in _expand(pattern, option)]
    counts = Counter(path.resolve() for path in paths)
    repeated = sorted(str(path) for path, count in counts.items() if count > 1)
    if repeated:
        raise UserError(
            f"named twice: {', '.join(repeated)}",
            where=option,
            fix="Name each file once, so that its text does not count double.",
            exit_code=ExitCode.BAD_OPTION,
        )
    first = Path(source[0])
    name = first.resolve().name if first.is_dir() else paths[0].name.split(".")[0]
    return local_source(name, "files", paths, [str(path) for path in paths])


def local_source(name: str, kind: str, paths: list[Path], names: list[str]) -> Source:
    """Returns files of this machine as a source; raises a UserError if one cannot be read."""
    hashes, stamps = {}, []
    for path, file_name in zip(paths, names, strict=True):
        with reading_errors(file_name):
            stamps.append(file_stamp(path))  # before the hash, so that no change goes unseen
            hashes[file_name] = sha256_file(path)
    return Source(name, paths, names, {"kind": kind, "sha256": hashes}, stamps)


def word_limit(dataset_size: str | None) -> int | None:
    """Returns the number of white-space words that `--dataset-size` stands for: 10k is 10 000."""
    if dataset_size is None:
        return None
    factor = {"k": 10**3, "M": 10**6, "B": 10**9}.get(dataset_size[-1:], 1)
    digits = dataset_size if factor == 1 else dataset_size[:-1]
    # int() refuses thousands of digits.
    if not digits.isdecimal() or len(digits) > 18 or int(digits) == 0:
        raise UserError(
            f"{reprlib.repr(dataset_size)} is not a number of words",
            where="--dataset-size",
            fix="Give a number such as 50000, 10k, 1M or 1B.",
            exit_code=ExitCode.UNKNOWN_SIZE,
        )
    return int(digits) * factor


def take_words(texts: Iterable[str], limit: int | None) -> Iterator[str]:
    """Yields texts for as long as they together stay within `limit` white-space words."""
    num_words = 0
    for text in texts:
        if limit is not None:
            num_words += count_words(text)
            if num_words > limit:
                return
        yield text


def count_words(text: str) -> int:
    """Returns the number of white-space words, `len(text.split())`, in little memory."""
    blocks = [text[n : n + _WORD_BLOCK] for n in range(0, len(text), _WORD_BLOCK)]
    cut = sum(not a[-1].isspace() and not b[0].isspace() for a, b in pairwise(blocks))
    return sum(len(block.split()) for block in blocks) - cut


def check_hub_size(dataset_size: str) -> None:
    """Checks that the Hub dataset has a config of this name.

    Raises:
        UserError: it has not; lists those it has.
    """
    if dataset_size not in DATASET_SIZES:
        raise UserError(
            f"{HUB_DATASET} has no size {dataset_size!r}",
            where="--dataset-size",
            fix=f"Choose one of: {', '.join(DATASET_SIZES)}.",
            exit_code=ExitCode.UNKNOWN_SIZE,
        )


def _resolve_hub(dataset_size: str, revision: str | None, console: Console | None) -> Source:
    check_hub_size(dataset_size)
    # Always the train split: a config's own test split can be in a larger config's train split.
    files = download_dataset_files(HUB_DATASET, dataset_size, "train", revision, console)
    description = {
        "kind": "hub",
        "dataset": HUB_DATASET,
        "config": dataset_size,
        "revision": files.revision,
        "files": files.names,
    }
    stamps = [file_stamp(path) for path in files.paths]
    return Source(dataset_size, files.paths, files.names, description, stamps)


def _expand(pattern: str, option: str) -> list[Path]:
    """Returns the files that a path, folder or glob stands for; leaves none out unsaid."""
    with reading_errors(f"{option} {pattern}"):
        path = Path(pattern)
        if not pattern:  # Path("") would be the current folder
            found = []
        elif path.is_dir():
            found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        elif path.exists() or path.is_symlink():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
            found = [p for p in found if p.name.endswith(SUFFIXES) or not p.is_dir()]
        for path in found:
            _check_file(path)
    if not found:
        raise UserError(
            "no such file",
            where=f"{option} {pattern}",
            fix=f"Name existing files, or a folder with files that end in {', '.join(SUFFIXES)}.",
            exit_code=ExitCode.NOT_FOUND,
        )
    return found


def _check_file(path: Path) -> None:
    """Raises a UserError if the path is not one of a file that can be read."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in str(path)):
        what = "the file's name has a line break, a control character or bytes that are not UTF-8"
        raise bad_input(ascii(str(path)), what, "Rename it.")
    if not path.name.endswith(SUFFIXES):
        fix = f"Files must end in {', '.join(SUFFIXES)}."
        raise bad_input(str(path), "unknown type of file", fix)
    if not path.is_file():
        is_dangling = path.is_symlink() and not path.exists()
        what = "is a link to a file that is not there" if is_dangling else "is not a regular file"
        raise bad_input(str(path), what, "Remove it, or name only files.")
