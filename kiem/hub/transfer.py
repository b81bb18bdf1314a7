"""Downloads from and uploads to the Hugging Face Hub.

Files go into the Hub's own cache. All files of a download belong to one commit. With
HF_HUB_OFFLINE=1 the newest cached commit is used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import filter as matching
from itertools import compress
from pathlib import Path

from rich.console import Console

from kiem.core.errors import ExitCode
from kiem.hub.dataset import local_path, verify_download
from kiem.hub.repo import Repo

_MODEL_FILES = (
    *("README.md", "config.json", "generation_config.json"),
    *("*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)


def looks_like_hub_id(name: str) -> bool:
    """Says whether a name that is no existing path can be an OWNER/NAME on the Hub."""
    is_path = name.startswith((".", "/", "~", "-")) or name.endswith(".json")
    return not is_path and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


@dataclass(frozen=True)
class HubFiles:
    """Downloaded files of a commit.

    Attributes:
        revision: the commit's id.
        paths: where they are on the disk.
        names: their names on the Hub.
        blobs: what identifies their content there; see `RemoteFile`.
    """

    revision: str
    paths: list[Path]
    names: list[str]
    blobs: list[str]


def download_dataset_files(
    dataset: str, config: str, revision: str | None = None, console: Console | None = None
) -> HubFiles:
    """Downloads the files CONFIG/train-*.parquet and returns them in the order of their names.

    Args:
        dataset: the Hub id of a dataset.
        config: the name of its configuration.
        revision: a branch, tag or commit; by default the newest commit.
        console: for a line about what is downloaded.

    Raises:
        UserError: not there, no access, no network, no room on the disk, or a file that is not the
            one on the Hub.
    """
    repo, pattern = Repo("dataset", dataset, revision), f"{config}/train-*.parquet"
    commit, files = repo.list_files(pattern)
    chosen = sorted(matching(files, pattern))
    if not chosen:
        raise repo.lacks(pattern, list(files))
    repo.require_all_parts(chosen)
    remote = [files[name] for name in chosen]
    is_new = [not local_path(file).exists() for file in remote]
    folder = repo.download(remote, console)
    for file in compress(remote, is_new):
        verify_download(file, folder / file.name)
    return HubFiles(commit, [folder / name for name in chosen], chosen, [f.blob for f in remote])


def download_tokenizer(repo: str, revision: str | None = None) -> HubFiles:
    """Downloads the tokenizer.json of a model.

    Raises:
        UserError: as `download_dataset_files`.
    """
    model, name = Repo("model", repo, revision), "tokenizer.json"
    commit, files = model.list_files(name)
    if name not in files:
        raise model.lacks(name, list(files))
    return HubFiles(commit, [model.download([files[name]]) / name], [name], [files[name].blob])


def download_model(repo: str) -> Path:
    """Downloads a model's card, configuration, weights and tokenizer; returns their folder.

    Raises:
        UserError: as `download_dataset_files`, or the repository holds no such model.
    """
    model = Repo("model", repo)
    _, files = model.list_files("config.json")
    top = [name for name in files if "/" not in name]
    weights = matching(top, "*.safetensors")
    if "config.json" not in top or not weights:
        raise model.lacks("config.json with *.safetensors", list(files), ExitCode.NOT_A_MODEL)
    model.require_all_parts(weights)
    wanted = [name for pattern in _MODEL_FILES for name in matching(top, pattern)]
    return model.download([files[name] for name in wanted])


def upload(repo: str, path: Path, *, private: bool) -> str:
    """Uploads a file or a folder to a model repository in one commit; returns the page's address.

    Args:
        repo: the repository, which is created if it does not exist.
        path: what to upload; a folder's files go to the top of the repository.
        private: whether a repository that is created is private.

    Raises:
        UserError: no login, no right to write there, no network, or no OWNER/NAME.
    """
    from huggingface_hub import HfApi

    model, api = Repo("model", repo), HfApi()
    url = model.call(api.create_repo, repo, private=private, exist_ok=True)
    message = f"Upload {path.name} with kiem"
    if path.is_dir():
        model.call(api.upload_folder, repo_id=repo, folder_path=path, commit_message=message)
    else:
        where = {"repo_id": repo, "path_in_repo": path.name, "commit_message": message}
        model.call(api.upload_file, path_or_fileobj=path, **where)
    return str(url)
