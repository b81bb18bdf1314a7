"""Datasets of the Hugging Face Hub: one commit of each, its card, and the files in its folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError
from kiem.hub.repo import RemoteFile, Repo, blob_of

_CARD = "README.md"


def is_offline() -> bool:
    """Says whether only what is in the Hub's cache is to be used."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@dataclass(frozen=True)
class HubDataset:
    """A commit of a dataset.

    Attributes:
        id: its Hub id, OWNER/NAME.
        commit: the commit's id.
        card: the text of its README.md; "" if it has none.
    """

    id: str
    commit: str
    card: str

    def list_folder(self, folder: str) -> dict[str, RemoteFile]:
        """Returns the files in a folder and below it by name, in order; "" is the whole dataset.

        There are none if there is no such folder. Offline they are those in the cache.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RemoteEntryNotFoundError

        repo = self._repo()
        if is_offline():
            start = f"{folder}/" if folder else ""
            files = repo.newest_cached()[1]
            return {name: file for name, file in files.items() if name.startswith(start)}

        def list_tree() -> list[RemoteFile]:
            which: dict[str, Any] = {"repo_type": "dataset", "revision": self.commit}
            try:
                entries = list(
                    HfApi().list_repo_tree(self.id, folder or None, recursive=True, **which)
                )
            except RemoteEntryNotFoundError:
                return []
            return [repo.described(self.commit, e) for e in entries if hasattr(e, "blob_id")]

        return {file.name: file for file in sorted(repo.call(list_tree))}

    def require_access(self, file: RemoteFile) -> None:
        """Raises a UserError if a file cannot be downloaded, as those of gated datasets."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        if not is_offline():
            url = hf_hub_url(self.id, file.name, repo_type="dataset", revision=self.commit)
            self._repo().call(get_hf_file_metadata, url)

    def error(self, what: str, fix: str, exit_code: ExitCode = ExitCode.NOT_FOUND) -> UserError:
        """Returns an error about this dataset."""
        return self._repo().error(what, fix, exit_code)

    def _repo(self) -> Repo:
        return Repo("dataset", self.id, self.commit)


def open_dataset(dataset: str, revision: str | None, console: Console | None) -> HubDataset:
    """Returns a commit of a dataset.

    Args:
        dataset: its Hub id, OWNER/NAME.
        revision: a branch, tag or commit; None: the newest commit.
        console: for a warning that it was renamed, or that only the cache is looked into.

    Raises:
        UserError: not there, no access, or no network.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repo = Repo("dataset", dataset, revision)
    if is_offline():
        commit, _ = repo.newest_cached()
        if console:
            what = f"of {dataset} at {commit[:12]} only what the cache has is read"
            warn(console, f"HF_HUB_OFFLINE=1: {what}, which may not be all")
        card = repo.snapshot(commit) / _CARD
        text = card.read_bytes() if card.is_file() else b""
        return HubDataset(dataset, commit, text.decode(errors="replace"))
    info = repo.call(HfApi().repo_info, dataset, repo_type="dataset", revision=revision, timeout=30)
    if console and info.id != dataset:
        warn(console, f"the dataset {dataset} is called {info.id} on the Hub now")

    def read_card() -> str:
        try:
            path = hf_hub_download(dataset, _CARD, repo_type="dataset", revision=info.sha)
        except RemoteEntryNotFoundError:
            return ""
        return Path(path).read_bytes().decode(errors="replace")

    return HubDataset(dataset, info.sha, repo.call(read_card))


def local_path(file: RemoteFile, folder: Path | None = None) -> Path:
    """Returns where `download_files` puts a file."""
    repo = Repo("dataset", file.repo)
    place = repo.snapshot(file.commit) if folder is None else folder / repo.cache.name
    return place / file.name


def download_files(
    files: Sequence[RemoteFile], folder: Path | None = None, console: Console | None = None
) -> None:
    """Downloads what is missing of files of datasets.

    Args:
        files: of any commits of any datasets.
        folder: where they go; None: into the Hub's cache.
        console: for a line about what is downloaded.

    Raises:
        UserError: no access, no network, or no room on the disk.
    """
    by_commit: dict[Repo, list[RemoteFile]] = {}
    for file in files:
        repo = Repo("dataset", file.repo, file.commit)
        repo = replace(repo, place=folder / repo.cache.name) if folder else repo
        by_commit.setdefault(repo, []).append(file)
    for repo, of_commit in by_commit.items():
        repo.download(of_commit, console)


def verify_download(file: RemoteFile, path: Path) -> None:
    """Raises a UserError if a file on the disk is not the one on the Hub."""
    # Where a disk has no links, the cache does not tell what a file is.
    is_known = re.fullmatch("([0-9a-f]{40}|[0-9a-f]{64})", file.blob)
    if is_known and blob_of(path, len(file.blob)) != file.blob:
        what = f"{file.name} is not what it is on the Hub: its hash differs"
        fix = f"Remove {path.resolve()} and run it again: it is downloaded anew."
        raise Repo("dataset", file.repo, file.commit).error(what, fix, ExitCode.DAMAGED)
