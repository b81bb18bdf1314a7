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
    Config,
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
    except ValueError as error:
        raise _bad_card(dataset, str(error)) from error
    entry = _config_of_card(dataset, card, name.config)
    config = entry.config_name if entry else name.config or DEFAULT_CONFIG
    if entry is None:
        listed = _list_folder_config(dataset, card, name.config)
        splits = splits_by_name(filter(_kind, listed), name.config or "")
    elif patterns := entry.patterns():
        listed = dataset.list_folder(common_folder(p for of in patterns.values() for p in of))
        try:
            splits = {split: matching_names(listed, of) for split, of in patterns.items()}
        except ValueError as error:
            raise _bad_card(dataset, str(error)) from error
    else:
        listed = dataset.list_folder(entry.folder)
        splits = splits_by_name(filter(_kind, listed), entry.folder)
    splits = {split: names for split, names in splits.items() if any(map(_kind, names))}
    if not splits:
        raise _nothing_to_read(dataset, config, listed)
    split = name.split or DEFAULT_SPLIT
    if split not in splits:
        example = _example(dataset, config, next(iter(splits)))
        fix = f"There is: {_shown(splits)}. Give one, as in {example}."
        raise dataset.error(f"config {config} has no split {split}", fix)
    read, not_read = _of_one_kind(splits[split])
    dataset.require_access(listed[read[0]])
    licence = card.license_name if card.license == "other" else None
    files = [listed[file] for file in read]
    return HubFiles(dataset, config, split, licence or card.license or None, files, not_read)


def _config_of_card(dataset: HubDataset, card: Card, wanted: str | None) -> Config | None:
    """Returns the config that is wanted, or the default; None if the card has none such."""
    if wanted is not None:
        return next((entry for entry in card.configs if entry.config_name == wanted), None)
    usual = [entry for entry in card.configs if entry.is_default or len(card.configs) == 1]
    if card.configs and len(usual) != 1:
        raise _several_configs(dataset, [entry.config_name for entry in card.configs])
    return usual[0] if usual else None


def _list_folder_config(
    dataset: HubDataset, card: Card, wanted: str | None
) -> dict[str, RemoteFile]:
    """Returns the files in the folder that is wanted as the config, or of the whole dataset."""
    listed = dataset.list_folder(wanted or "")
    if wanted and not listed:
        there = [entry.config_name for entry in card.configs]
        there = there or folder_configs(filter(_kind, dataset.list_folder("")))
        fix = f"There is: {_shown(there)}." if there else "It has no configs: leave it out."
        raise dataset.error(f"there is no config {wanted}", fix)
    if not wanted and len(folders := folder_configs(filter(_kind, listed))) > 1:
        raise _several_configs(dataset, folders)
    return listed


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


def _bad_card(dataset: HubDataset, reason: str) -> UserError:
    fix = "Name an earlier commit with @REVISION, or download the files and name them instead."
    what = f"the top of its card, README.md, cannot be read ({reason})"
    return dataset.error(what, fix, ExitCode.BAD_INPUT)


def _several_configs(dataset: HubDataset, names: list[str]) -> UserError:
    fix = f"Give one, as in {_example(dataset, names[0])}. There is: {_shown(names)}."
    return dataset.error(f"it has {len(names):,} configs", fix, ExitCode.BAD_OPTION)


def _nothing_to_read(dataset: HubDataset, config: str, listed: dict[str, RemoteFile]) -> UserError:
    names = [*(listed or dataset.list_folder(""))]
    fix = f"There is: {_shown(names) or 'nothing'}."
    if any(name.endswith(".py") for name in names):
        converted = f"hub:{dataset.id}@refs/convert/parquet"
        fix += f" kiem does not run its program; try the Hub's own copy, {converted}."
    return dataset.error(f"config {config} has no file that can be read", fix)


def _example(dataset: HubDataset, *parts: str) -> str:
    return ":".join((HUB_PREFIX + dataset.id, *parts))


def _shown(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _MOST_SHOWN:,} more" if len(shown) > _MOST_SHOWN else ""
    return ", ".join(shown[:_MOST_SHOWN]) + more
