"""Sources on the Hub, hub:OWNER/NAME[@REVISION][:CONFIG][:SPLIT], and which files they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from rich.console import Console

from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.data.read.formats import METADATA, format_of, shown_suffix
from kiem.hub.dataset import HubDataset, open_dataset
from kiem.hub.layout import (
    DEFAULT_CONFIG,
    DEFAULT_SPLIT,
    Card,
    common_folder,
    folder_configs,
    matching_names,
    parse_card,
    splits_by_name,
)
from kiem.hub.repo import RemoteFile

HUB_PREFIX = "hub:"
_MOST_SHOWN = 40
_FORM = re.compile(
    r"hub:(?P<dataset>[\w.-]+/[\w.-]+)(@(?P<revision>[^:\s]+))?"
    r"(:(?P<config>[^:]*))?(:(?P<split>[^:]*))?",
    re.ASCII,
)
# Formats that one dataset may mix are one kind. Where two are as frequent, the first is read.
_KINDS = {"parquet": 0, "arrow": 1, "json lines": 2, "json": 2, "csv": 3, "tsv": 3, "text": 4}


class HubName(NamedTuple):
    """What a source on the Hub is called; None: not given."""

    dataset: str
    revision: str | None
    config: str | None
    split: str | None

    @property
    def folder_name(self) -> str:
        """The name without its owner and revision, as one for a folder."""
        parts = [self.dataset.split("/")[1], self.config, self.split]
        return re.sub(r"[^\w.+-]", "_", "_".join(part for part in parts if part))


class HubFiles(NamedTuple):
    """The files of a source on the Hub.

    Attributes:
        dataset: the commit that they are of.
        config: the name of their config.
        split: the name of their split.
        licence: what the card says, if it does.
        files: those that are read, in the order of their names.
        not_read: number of the others, by suffix.
    """

    dataset: HubDataset
    config: str
    split: str
    licence: str | list[str] | None
    files: list[RemoteFile]
    not_read: Counter[str]

    @property
    def label(self) -> str:
        """The name under which the documents are counted: of the dataset, config and split."""
        split = "" if self.split == DEFAULT_SPLIT else f":{self.split}"
        config = f":{self.config}" if split or self.config != DEFAULT_CONFIG else ""
        return f"{self.dataset.id}{config}{split}"


def parse_hub_name(text: str, option: str) -> HubName:
    """Returns the parts of hub:OWNER/NAME[@REVISION][:CONFIG][:SPLIT].

    Raises:
        UserError: it has another form.
    """
    if (found := _FORM.fullmatch(text)) is None:
        fix = "Write hub:OWNER/NAME, and where needed @REVISION, :CONFIG and :SPLIT behind it."
        raise bad_option(f"{option} {text}", "not the name of a dataset on the Hub", fix)
    revision, config, split = (found[part] or None for part in ("revision", "config", "split"))
    return HubName(found["dataset"], revision, config, split)


def find_hub_files(name: HubName, console: Console | None = None) -> HubFiles:
    """Finds the files of a source on the Hub, without downloading them.

    Args:
        name: what it is called.
        console: for warnings.

    Raises:
        UserError: there is no such dataset, config or split, or no file that can be read (lists
            what there is); no access, or no network.
    """
    dataset = open_dataset(name.dataset, name.revision, console)
    try:
        card = parse_card(dataset.card)
        found = _find_config(dataset, card, name.config)
    except ValueError as error:
        what = f"the top of its card, README.md, cannot be read ({error})"
        fix = "Name an earlier commit with @REVISION, or download the files and name them instead."
        raise dataset.error(what, fix, ExitCode.BAD_INPUT) from error
    splits = {split: names for split, names in found.splits.items() if any(map(_kind, names))}
    if not splits:
        raise _nothing_to_read(dataset, found)
    split = name.split or DEFAULT_SPLIT
    if split not in splits:
        example = _example(dataset, found.name, next(iter(splits)))
        fix = f"There is: {_shown(splits)}. Give one, as in {example}."
        raise dataset.error(f"config {found.name} has no split {split}", fix)
    read, not_read = _of_one_kind(splits[split])
    files = [found.listed[file] for file in read]
    dataset.require_access(files[0])
    licence = card.license_name if card.license == "other" else None
    return HubFiles(dataset, found.name, split, licence or card.license or None, files, not_read)


class _Config(NamedTuple):
    """A config that was found: its name, files by name, and the names of each split's files."""

    name: str
    listed: dict[str, RemoteFile]
    splits: dict[str, list[str]]


def _find_config(dataset: HubDataset, card: Card, wanted: str | None) -> _Config:
    """Finds the config that is wanted, or the default one.

    Raises:
        UserError: there is none such; lists those that there are.
        ValueError: the card names files in a way that is not known.
    """
    named = {entry.config_name: entry for entry in card.configs}
    usual = [entry for entry in card.configs if entry.is_default or len(card.configs) == 1]
    if wanted is None and card.configs:
        if len(usual) != 1:
            raise _several_configs(dataset, [*named])
        wanted = usual[0].config_name
    if wanted not in named:
        return _find_folder(dataset, [*named], wanted)
    entry = named[wanted]
    if patterns := entry.patterns():
        listed = dataset.list_folder(common_folder(p for of in patterns.values() for p in of))
        splits = {split: matching_names(listed, of) for split, of in patterns.items()}
    else:
        listed = dataset.list_folder(entry.folder)
        splits = splits_by_name(filter(_kind, listed), entry.folder)
    return _Config(wanted, listed, splits)


def _find_folder(dataset: HubDataset, named: list[str], wanted: str | None) -> _Config:
    """Finds a config that the card does not name: a folder, or all files."""
    is_whole = wanted in (None, ".")
    if wanted and not is_whole and (listed := dataset.list_folder(wanted)):
        return _Config(wanted, listed, splits_by_name(filter(_kind, listed), wanted))
    listed = dataset.list_folder("")
    folders = folder_configs(filter(_kind, listed))
    if wanted in (None, DEFAULT_CONFIG) and not named:
        if len(folders) > 1:
            all_of_them = PurePosixPath(folders[0]).parent
            raise _several_configs(dataset, folders, _example(dataset, str(all_of_them)))
    elif not is_whole:
        there = named or folders
        fix = f"There is: {_shown(there)}." if there else "It has no configs: leave it out."
        raise dataset.error(f"there is no config {wanted}", fix)
    return _Config(wanted or DEFAULT_CONFIG, listed, splits_by_name(filter(_kind, listed), ""))


def _of_one_kind(names: list[str]) -> tuple[list[str], Counter[str]]:
    """Returns the files of the most frequent kind, and the number of the others by suffix."""
    kinds = {name: _KINDS[kind] for name in names if (kind := _kind(name))}
    counts = Counter(kinds.values())
    most = max(counts, key=lambda kind: (counts[kind], -kind))
    read = [name for name in names if kinds.get(name) == most]
    others = {*names}.difference(read)
    return read, Counter(shown_suffix(PurePosixPath(name).name) for name in others)


def _kind(name: str) -> str | None:
    """Returns what is in a file by its name, None if it cannot be read."""
    last = PurePosixPath(name).name
    found = None if last in METADATA else format_of(last)
    return found and found[0]


def _several_configs(dataset: HubDataset, names: list[str], whole: str = "") -> UserError:
    """Returns the error that one must be chosen; `whole` stands for all of them, if that can be."""
    all_of_them = f" or {whole} for all of them." * bool(whole)
    fix = f"Give one, as in {_example(dataset, names[0])}{all_of_them or '.'}"
    what = f"it has {len(names):,} configs"
    return dataset.error(what, f"{fix} There is: {_shown(names)}.", ExitCode.BAD_OPTION)


def _nothing_to_read(dataset: HubDataset, config: _Config) -> UserError:
    names = [*(config.listed or dataset.list_folder(""))]
    fix = f"There is: {_shown(names) or 'nothing'}."
    if any(name.endswith(".py") for name in names):
        converted = f"{HUB_PREFIX}{dataset.id}@refs/convert/parquet"
        fix += f" kiem does not run its program; try the Hub's own copy, {converted}."
    return dataset.error(f"config {config.name} has no file that can be read", fix)


def _example(dataset: HubDataset, *parts: str) -> str:
    return ":".join((HUB_PREFIX + dataset.id, *parts))


def _shown(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _MOST_SHOWN:,} more" if len(shown) > _MOST_SHOWN else ""
    return ", ".join(shown[:_MOST_SHOWN]) + more
