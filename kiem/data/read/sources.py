"""Sources of text: the files of the Hub dataset, local files or the built-in sample."""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.console import Console

from kiem.config import DATASET_SIZES, HUB_DATASET
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError, bad_option, no_effect
from kiem.core.files import sha256_file
from kiem.data.read.find_files import find_files, show_counts
from kiem.data.read.formats import format_of, look_inside
from kiem.data.read.hub_dataset import HUB_PREFIX, HubName, find_hub_files, parse_hub_name
from kiem.data.read.source_file import STANDARD_INPUT, SourceFile, file_stamp, reading_errors
from kiem.data.read.text_files import BLANK_LINES, EVERY_LINE
from kiem.data.source_record import hub_file_name, list_sources
from kiem.hub.dataset import local_path
from kiem.hub.transfer import download_dataset_files

DEFAULT_HUB_SIZE = "10k"
_WORD_BLOCK = 1 << 20
# White space, as Python's `isspace` has it: by the bytes of UTF-8, and what takes more than one.
_IS_SPACE = bytes(byte in b"\t\n\v\f\r\x1c\x1d\x1e\x1f " for byte in range(256))
_WIDE_SPACES = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


@dataclass(frozen=True)
class Source:
    """The files of a source, and what identifies them.

    Attributes:
        name: short name, used for the chunk directory.
        files: in reading order.
        description: what the manifest records: kind, revision or the sha256 of every file.
        not_read: number of files in folders that are not read, by suffix.
    """

    name: str
    files: list[SourceFile]
    description: dict[str, Any]
    not_read: Counter[str] = field(default_factory=Counter)


def resolve_source(
    source: tuple[str, ...],
    dataset_size: str | None,
    *,
    recorded: dict[str, Any] | None = None,
    console: Console | None = None,
    option: str = "--source",
    document_separator: str | None = None,
    is_apart: bool = False,
) -> Source:
    """Finds the files that an option names, and downloads those of the Hub dataset.

    Args:
        source: ("hub",), or any number of "sample", hub:OWNER/NAME (whose files are not downloaded
            here), files, folders, globs and standard input ("-").
        dataset_size: the Hub dataset's config; ignored for other sources.
        recorded: what a manifest records of these sources. Of the Hub, the commits in it are taken
            in place of the newest.
        console: for the progress of a download, and the files that are not read.
        option: the option's name, for messages.
        document_separator: what cuts text files into documents; None: each is one.
        is_apart: whether the description has an entry for each, also where files follow files.

    Raises:
        UserError: unknown size, no such file, a file that cannot be read, or trouble with the Hub.
    """
    recorded = recorded or {}
    if document_separator is not None:
        if not document_separator.strip() or len(document_separator.splitlines()) > 1:
            what = f"{document_separator!r} is not the text of one line"
            fix = f"Give such a text, or {BLANK_LINES} or {EVERY_LINE}."
            raise bad_option("--document-separator", what, fix)
        if source == ("hub",):
            raise no_effect("--document-separator", "on the Hub dataset, whose documents are rows")
    if source == ("hub",):
        size = dataset_size or DEFAULT_HUB_SIZE
        is_same = recorded.get("config") == size and "split" not in recorded
        return _resolve_hub(size, recorded.get("revision") if is_same else None, console)
    if "hub" in source:
        fix = f"Beside other sources, write {HUB_PREFIX}{HUB_DATASET}:{DEFAULT_HUB_SIZE}."
        raise bad_option(option, "'hub' stands alone", fix)
    earlier = iter([entry for entry in list_sources(recorded) if entry.get("kind") == "hub"])
    parts: list[Source] = []
    for kind, patterns in groupby(source, _kind_of_source):
        if kind == "files" and not is_apart:
            parts.append(local_source([*patterns], option, console, document_separator))
            continue
        for pattern in patterns:
            if kind == "files":
                parts.append(local_source([pattern], option, console, document_separator))
            elif kind == "sample":
                parts.append(_sample_source(document_separator))
            else:
                name = parse_hub_name(pattern, option)
                before = next(earlier, {})
                if name.revision is None and before.get("dataset") == name.dataset:
                    name = name._replace(revision=before["revision"])
                parts.append(_hub_source(name, option, console, document_separator))
    return _join(parts, option)


def source_name(source: tuple[str, ...], option: str = "--source") -> str:
    """Returns the `Source.name` of files, folders and so on, without reading them.

    Raises:
        UserError: there is no such file.
    """
    first = source[0]
    if first.startswith(HUB_PREFIX):
        return parse_hub_name(first, option).folder_name
    if first == "sample":
        return first
    if first == STANDARD_INPUT:
        return "stdin"
    if Path(first).is_dir():
        return Path(first).resolve().name
    (path, _), *_ = find_files([first], option)[0]
    return path.name.split(".")[0]


def _kind_of_source(pattern: str) -> str:
    if pattern.startswith(HUB_PREFIX):
        return "hub"
    return "sample" if pattern == "sample" else "files"


def _join(parts: list[Source], option: str) -> Source:
    """Returns several sources as one; raises a UserError if two have a file in common."""
    if len(parts) == 1:
        return parts[0]
    files = [file for part in parts for file in part.files]
    counts = Counter(
        file.name if file.remote or file.name == STANDARD_INPUT else os.path.realpath(file.path)
        for file in files
    )
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        fix = "Name each file once, so that its text does not count double."
        raise bad_option(option, f"named twice: {', '.join(repeated[:5])}", fix)
    description = {"kind": "several", "sources": [part.description for part in parts]}
    not_read = sum((part.not_read for part in parts), Counter[str]())
    return Source(parts[0].name, files, description, not_read)


def local_source(
    patterns: Sequence[str],
    option: str,
    console: Console | None = None,
    document_separator: str | None = None,
) -> Source:
    """Returns the source that files, folders, globs and standard input are; see `resolve_source`.

    Raises:
        UserError: there is no such file, or one cannot be read.
    """
    found, not_read = find_files(patterns, option)
    _warn_not_read(not_read, option, console)
    name = source_name((*patterns,), option)
    return replace(_files_source(name, "files", found, document_separator), not_read=not_read)


def _warn_not_read(not_read: Counter[str], option: str, console: Console | None) -> None:
    if not_read and console is not None:
        warn(console, f"{option}: not read: {show_counts(not_read)}")


def _files_source(
    name: str, kind: str, found: Sequence[tuple[Path, str]], separator: str | None
) -> Source:
    """Returns local files as a source; raises a UserError if one cannot be read."""
    hashes, files = {}, []
    for path, file_name in found:
        with reading_errors(file_name):
            stamp = file_stamp(path)  # before the hash, so that no change goes unseen
            hashes[file_name] = sha256_file(path)
            file_format = format_of(path.name) or ("text", None)
            file = SourceFile(path, file_name, *file_format, separator, stamp)
            files.append(look_inside(file))
    return Source(name, files, {"kind": kind, "sha256": hashes})


def _sample_source(separator: str | None) -> Source:
    path = Path(str(resources.files("kiem.data.read") / "sample" / "dutch.jsonl"))
    return _files_source("sample", "sample", [(path, "sample")], separator)


def _hub_source(
    name: HubName, option: str, console: Console | None, separator: str | None
) -> Source:
    """Returns a source on the Hub, with files that are not downloaded yet."""
    found = find_hub_files(name, console)
    _warn_not_read(found.not_read, f"{option} {HUB_PREFIX}{name.dataset}", console)
    files = []
    for remote in found.files:
        kind = format_of(PurePosixPath(remote.name).name)
        assert kind is not None
        stamp = (remote.num_bytes, 0)
        path, shown = local_path(remote), hub_file_name(remote.repo, remote.name)
        files.append(SourceFile(path, shown, *kind, separator, stamp, remote, found.label))
    description = {
        "kind": "hub",
        "dataset": name.dataset,
        "config": found.config,
        "split": found.split,
        "revision": found.dataset.commit,
        "files": [remote.name for remote in found.files],
        "blobs": [remote.blob for remote in found.files],
        "licence": found.licence,
    }
    return Source(name.folder_name, files, description, found.not_read)


def check_hub_size(dataset_size: str) -> None:
    """Raises a UserError, which lists the sizes, if the Hub dataset has no config of this name."""
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
    files = download_dataset_files(HUB_DATASET, dataset_size, revision, console)
    description = {
        "kind": "hub",
        "dataset": HUB_DATASET,
        "config": dataset_size,
        "revision": files.revision,
        "files": files.names,
        "blobs": files.blobs,
    }
    found = zip(files.paths, files.names, strict=True)
    parquet = [SourceFile(p, name, "parquet", None, None, file_stamp(p)) for p, name in found]
    return Source(dataset_size, parquet, description)


def word_limit(dataset_size: str | None) -> int | None:
    """Returns the number of white-space words in `--dataset-size`: 10k is 10 000."""
    if dataset_size is None:
        return None
    factor = {"k": 10**3, "M": 10**6, "B": 10**9}.get(dataset_size[-1:], 1)
    digits = dataset_size if factor == 1 else dataset_size[:-1]
    # int() refuses thousands of digits.
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 18 or int(digits) == 0:
        raise UserError(
            f"{reprlib.repr(dataset_size)} is not a number of words",
            where="--dataset-size",
            fix="Give a number such as 50000, 10k, 1M or 1B.",
            exit_code=ExitCode.UNKNOWN_SIZE,
        )
    return int(digits) * factor


def count_words(text: str) -> int:
    """Returns the number of white-space words, `len(text.split())`, fast and in little memory."""
    num_words, is_after_space = 0, True
    for start in range(0, len(text), _WORD_BLOCK):
        block = text[start : start + _WORD_BLOCK]
        for space in _WIDE_SPACES:
            block = block.replace(space, " ")
        is_space = np.frombuffer(block.encode(errors="surrogatepass").translate(_IS_SPACE), bool)
        num_words += np.count_nonzero(is_space[:-1] > is_space[1:])
        num_words += bool(is_after_space and not is_space[0])
        is_after_space = is_space[-1]
    return num_words
