"""Where text comes from: the files of the Hub dataset, local files or the built-in sample."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from kiem.config import DATASET_SIZES, HUB_DATASET
from kiem.data.hub import download_dataset_files
from kiem.errors import ExitCode, UserError
from kiem.files import sha256_file

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
DEFAULT_HUB_SIZE = "10k"


@dataclass(frozen=True)
class Source:
    """A resolved source: files in the order they are read, and what identifies them.

    Attributes:
        name: short name, used for the chunk directory.
        paths: the files.
        names: what each file is called in messages and in the manifest.
        description: what the manifest records: kind, revision or the sha256 of every file.
    """

    name: str
    paths: list[Path]
    names: list[str]
    description: dict[str, Any] = field(default_factory=dict)


def resolve_source(
    source: tuple[str, ...], dataset_size: str | None, option: str = "--source"
) -> Source:
    """Finds (and for the Hub, downloads) the files that an option names.

    Args:
        source: ("hub",), ("sample",), or files, folders and globs.
        dataset_size: the Hub dataset's config; not looked at for other sources.
        option: the option's name, for messages.

    Raises:
        UserError: unknown size, no such file, a type of file that cannot be read, or trouble with
            the Hub.
    """
    if source == ("hub",):
        return _resolve_hub(dataset_size or DEFAULT_HUB_SIZE)
    if source == ("sample",):
        path = Path(str(resources.files("kiem.data") / "sample" / "dutch.jsonl"))
        return Source(
            "sample",
            [path],
            ["sample"],
            {"kind": "sample", "sha256": {"sample": sha256_file(path)}},
        )
    if "hub" in source or "sample" in source:
        raise UserError(
            "'hub' and 'sample' stand alone",
            where=option,
            fix="Give either one of them, or files.",
            exit_code=ExitCode.BAD_OPTION,
        )
    paths = [path for pattern in source for path in _expand(pattern, option)]
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1})
    if repeated:
        raise UserError(
            f"named twice: {', '.join(repeated)}",
            where=option,
            fix="Name each file once, so that its text does not count double.",
            exit_code=ExitCode.BAD_OPTION,
        )
    names = [str(path) for path in paths]
    hashes = {name: sha256_file(path) for name, path in zip(names, paths, strict=True)}
    first = Path(source[0])
    name = first.name if first.is_dir() else paths[0].name.split(".")[0]
    return Source(name, paths, names, {"kind": "files", "sha256": hashes})


def word_limit(dataset_size: str | None) -> int | None:
    """Returns the number of white-space words that `--dataset-size` stands for: 10k is 10 000."""
    if dataset_size is None:
        return None
    factor = {"k": 10**3, "M": 10**6, "B": 10**9}.get(dataset_size[-1:], 1)
    digits = dataset_size if factor == 1 else dataset_size[:-1]
    if not digits.isdecimal() or int(digits) == 0:
        raise UserError(
            f"{dataset_size!r} is not a number of words",
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
            num_words += len(text.split())
            if num_words > limit:
                return
        yield text


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


def _resolve_hub(dataset_size: str) -> Source:
    check_hub_size(dataset_size)
    # Always the train split: a config's own test split can be in a larger config's train split.
    files = download_dataset_files(HUB_DATASET, dataset_size, "train")
    description = {
        "kind": "hub",
        "dataset": HUB_DATASET,
        "config": dataset_size,
        "revision": files.revision,
        "files": files.names,
    }
    return Source(dataset_size, files.paths, files.names, description)


def _expand(pattern: str, option: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if p.is_file() and p.name.endswith(SUFFIXES)]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        found = [p for p in found if p.is_file()]
    if not found:
        raise UserError(
            "no such file",
            where=f"{option} {pattern}",
            fix=f"Name existing files, or a folder with files that end in {', '.join(SUFFIXES)}.",
            exit_code=ExitCode.NOT_FOUND,
        )
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise _bad_input(
                str(path), "unknown type of file", f"Files must end in {', '.join(SUFFIXES)}."
            )
    return found


def _bad_input(where: str, what: str, fix: str) -> UserError:
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT)
