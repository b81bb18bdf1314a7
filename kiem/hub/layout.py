"""Which files of a dataset's repository belong to which config and split.

The rules are those of `datasets`: what the `configs` in the card name, else what the names of
folders and files say (https://huggingface.co/docs/hub/datasets-data-files-configuration and
datasets/data_files.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import takewhile
from pathlib import PurePosixPath

import msgspec
import yaml

DEFAULT_CONFIG, DEFAULT_SPLIT = "default", "train"
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_SEPARATOR = "[-._ 0-9]"  # around such a word
_NUMBERED = re.compile(r"data/([^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*")


class SplitFiles(msgspec.Struct):
    """The files of a split, in an entry of `configs`."""

    split: str
    path: str | list[str]


class Config(msgspec.Struct):
    """An entry of `configs` in a card."""

    config_name: str
    data_files: str | list[str | SplitFiles] = []
    data_dir: str = ""
    default: str = ""

    @property
    def is_default(self) -> bool:
        """Whether it is the one that is meant where none is named."""
        return self.config_name == DEFAULT_CONFIG or self.default.lower() == "true"

    @property
    def folder(self) -> str:
        """The folder of the files; "" is the whole repository."""
        return self.data_dir.strip("/")

    def patterns(self) -> dict[str, list[str]]:
        """Returns the patterns of the files of each split; {}: their names say the split.

        Raises:
            ValueError: a pattern leads out of the repository.
        """
        patterns: dict[str, list[str]] = {}
        for given in [self.data_files] if isinstance(self.data_files, str) else self.data_files:
            of = SplitFiles(DEFAULT_SPLIT, given) if isinstance(given, str) else given
            for path in [of.path] if isinstance(of.path, str) else of.path:
                whole = PurePosixPath(self.folder, path.lstrip("/"))
                if ".." in whole.parts or "://" in path:
                    raise ValueError(f"{path} is not in the dataset")
                patterns.setdefault(of.split, []).append(str(whole))
        return patterns


class Card(msgspec.Struct):
    """What kiem reads of the YAML at the top of a dataset's README.md."""

    configs: list[Config] = []
    license: str | list[str] | None = None
    license_name: str | None = None


def parse_card(text: str) -> Card:
    """Returns what a README.md says; every scalar is text, as it is written.

    Raises:
        ValueError: the YAML is damaged, or a value has another type.
    """
    found = _FRONT_MATTER.match(text.removeprefix("\ufeff"))
    try:
        loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # several times as fast
        content = yaml.load(found[1], Loader=loader) if found else {}
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"not YAML: {reason}") from error
    if not isinstance(content, dict | None):
        raise ValueError("no keys with values")
    given = {key: value for key, value in (content or {}).items() if value}
    return msgspec.convert(given, Card)


def common_folder(patterns: Iterable[str]) -> str:
    """Returns the folder that all files that match are in or below; "" is the repository."""
    fixed = []
    for pattern in patterns:
        parts = PurePosixPath(pattern).parent.parts
        fixed.append("/".join(takewhile(lambda part: not re.search(r"[*?\[]", part), parts)))
    return os.path.commonpath(fixed)


def matching_names(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Returns the names that one of several patterns matches, in order.

    Raises:
        ValueError: it is no pattern that `datasets` knows.
    """
    from fsspec.utils import glob_translate

    found = set()
    for pattern in patterns:
        matches = re.compile(glob_translate(pattern)).fullmatch
        hidden = _num_hidden(pattern)
        found |= {name for name in names if matches(name) and _num_hidden(name) == hidden}
    return sorted(found)


def splits_by_name(names: Iterable[str], folder: str) -> dict[str, list[str]]:
    """Returns the names of each split's files, by the first rule that finds a split.

    Args:
        names: of the files in a folder and below it.
        folder: that folder; "" is the repository.
    """
    numbered: dict[str, list[str]] = {}
    by_folder: dict[str, list[str]] = {}
    by_file: dict[str, list[str]] = {}
    rest: dict[str, list[str]] = {}
    for name in sorted(names):
        inside = str(PurePosixPath(name).relative_to(folder))
        *folders, last = PurePosixPath(inside).parts
        if _num_hidden(inside):
            continue
        if found := _NUMBERED.fullmatch(inside):
            numbered.setdefault(found[1], []).append(name)
        for split in {split for part in folders for split in _splits_in(part + "-")}:
            by_folder.setdefault(split, []).append(name)
        for split in _splits_in(last):
            by_file.setdefault(split, []).append(name)
        rest.setdefault(DEFAULT_SPLIT, []).append(name)
    return numbered or by_folder or by_file or rest


def folder_configs(names: Iterable[str]) -> list[str]:
    """Returns the folders that are configs of a repository whose card names none.

    They are those beside each other that all files are in, unless they are named after splits.
    """
    parents = [PurePosixPath(name).parent for name in names]
    if not parents:
        return []
    common = len(PurePosixPath(os.path.commonpath(parents)).parts)
    folders = sorted({"/".join(parent.parts[: common + 1]) for parent in parents})
    is_beside = all(len(parent.parts) > common for parent in parents)
    are_splits = any(_splits_in(f"{PurePosixPath(folder).name}-") for folder in folders)
    return folders if is_beside and not are_splits else []


def _splits_in(name: str) -> list[str]:
    """Returns the splits that a name says, whose words must have a separator after them."""
    words = _SPLIT_WORDS.items()
    return [s for s, w in words if re.match(f"(.*{_SEPARATOR})?({w}){_SEPARATOR}", name)]


def _num_hidden(name: str) -> int:
    """Returns how many parts of a path are hidden: only patterns with as many match them."""
    *folders, last = PurePosixPath(name).parts
    return sum(part.startswith((".", "__")) for part in folders) + last.startswith(".")
