"""The only place that talks to the Hugging Face Hub: it brings files into the Hub's own cache.

A download is of one commit, so its files belong together. With HF_HUB_OFFLINE=1 the cache answers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from rich.console import Console

from kiem.core.console import PlainConsole
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import format_bytes, require_free_space
from kiem.core.front_matter import read_front_matter
from kiem.download_progress import DownloadProgress
from kiem.hub_errors import explain, pause_seconds

_MODEL_FILES = (
    *("README.md", "config.json", "generation_config.json"),
    *("*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
_ONLINE = "Run it once without HF_HUB_OFFLINE, or name local files or a local folder instead."
_NUM_TRIES = 4


def looks_like_hub_id(name: str) -> bool:
    """Says whether a name that is no existing path can be an OWNER/NAME on the Hub."""
    is_path = name.startswith((".", "/", "~", "-")) or name.endswith(".json")
    return not is_path and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


@dataclass(frozen=True)
class HubFiles:
    """Files of a dataset: the commit, where they are on disk, and their names on the Hub."""

    revision: str
    paths: list[Path]
    names: list[str]


@dataclass(frozen=True)
class HubTokenizer:
    """Files of a tokenizer: the commit, and where they are on disk."""

    revision: str
    tokenizer_json: Path
    config_json: Path | None


def download_dataset_files(
    dataset: str,
    config: str,
    split: str = "train",
    revision: str | None = None,
    console: Console | None = None,
) -> HubFiles:
    """Downloads the parquet files of one split and returns them in the order of their names.

    Args:
        dataset: the Hub id of a dataset.
        config: a configuration of the dataset's card or, if it names none, a folder.
        split: a split of the configuration.
        revision: a branch, tag or commit; by default the newest commit.
        console: where the progress is shown.

    Raises:
        UserError: not there, no access, no network, or no room on the disk.
    """
    repo = _Repo("dataset", dataset, revision)
    commit, files = repo.files(f"{config}/*")
    names = list(files)
    card = repo.download(commit, "README.md") if "README.md" in names else None
    parquet = matching(names, "*.parquet")
    configs = _configs_by_card(card) or _configs_by_folder(parquet)
    if config not in configs:
        raise repo.lacks(f"configuration {config!r}", list(configs))
    if split not in configs[config]:
        raise repo.lacks(f"split {split!r} in configuration {config!r}", list(configs[config]))
    patterns = configs[config][split]
    chosen = sorted(name for name in parquet if any(_matches(name, p) for p in patterns))
    if not chosen:
        raise repo.lacks(f"parquet file {' or '.join(patterns)}", names)
    repo.require_all_parts(chosen)
    shown = console or PlainConsole(quiet=True)
    return HubFiles(commit, repo.download_all(commit, {n: files[n] for n in chosen}, shown), chosen)


def download_tokenizer(repo: str, revision: str | None = None) -> HubTokenizer:
    """Downloads tokenizer.json and, if there is one, tokenizer_config.json; returns where they are.

    Args:
        repo: the Hub id of a model.
        revision: a branch, tag or commit; by default the newest commit.

    Raises:
        UserError: as `download_dataset_files`.
    """
    model, config = _Repo("model", repo, revision), "tokenizer_config.json"
    commit, files = model.files("tokenizer.json")
    names = list(files)
    if "tokenizer.json" not in names:
        raise model.lacks("tokenizer.json", names)
    tokenizer_json = model.download(commit, "tokenizer.json")
    config_json = model.download(commit, config) if config in names else None
    return HubTokenizer(commit, tokenizer_json, config_json)


def download_model(repo: str) -> Path:
    """Downloads a model's card, configuration, weights and tokenizer; returns their folder.

    Args:
        repo: the Hub id of a model.

    Raises:
        UserError: as `download_dataset_files`, or the repository holds no such model.
    """
    from huggingface_hub import snapshot_download

    model = _Repo("model", repo)
    commit, files = model.files("config.json")
    names = list(files)
    top = [name for name in names if "/" not in name]
    weights = matching(top, "*.safetensors")
    if "config.json" not in top or not weights:
        raise model.lacks("config.json with *.safetensors", names, ExitCode.NOT_A_MODEL)
    model.require_all_parts(weights)
    wanted = [name for p in _MODEL_FILES for name in matching(top, p)]
    return Path(model.call(snapshot_download, repo, revision=commit, allow_patterns=wanted))


def upload(repo: str, path: Path, *, private: bool) -> str:
    """Uploads a file or a folder to a model repository in one commit; returns the page's address.

    Args:
        repo: the repository, which is made if need be.
        path: what to upload; a folder's files go to the top of the repository.
        private: whether only you see a repository that is made.

    Raises:
        UserError: no login, no right to write there, no network, or no OWNER/NAME.
    """
    from huggingface_hub import HfApi

    model, api = _Repo("model", repo, needed_right="write to"), HfApi()
    url = model.call(api.create_repo, repo, private=private, exist_ok=True)
    message = f"Upload {path.name} with kiem"
    if path.is_dir():
        model.call(api.upload_folder, repo_id=repo, folder_path=path, commit_message=message)
    else:
        where = {"repo_id": repo, "path_in_repo": path.name, "commit_message": message}
        model.call(api.upload_file, path_or_fileobj=path, **where)
    return str(url)


class _File(NamedTuple):
    """A file's size and its name among the blobs of the cache; zero and "" when not known."""

    num_bytes: int = 0
    blob: str = ""


@dataclass(frozen=True)
class _Repo:
    kind: Literal["dataset", "model"]
    id: str
    revision: str | None = None
    needed_right: str = "read"

    def files(self, needed: str) -> tuple[str, dict[str, _File]]:
        """Returns a commit and its files; offline the newest cached one, best with `needed`."""
        from huggingface_hub import HfApi, constants

        if not constants.HF_HUB_OFFLINE:
            which = {"repo_type": self.kind, "revision": self.revision, "timeout": 30}
            info = self.call(HfApi().repo_info, self.id, files_metadata=True, **which)
            return info.sha, {file.rfilename: _describe(file) for file in info.siblings or []}
        cached = []
        for commit in (self.cache() / "snapshots").glob(self.revision or "*"):
            paths = [path for path in commit.rglob("*") if path.is_file()]
            names = sorted(path.relative_to(commit).as_posix() for path in paths)
            rank = (bool(matching(names, needed)), commit.stat().st_mtime)
            cached.append((rank, commit.name, names))
        if not cached:
            raise self.lacks("copy of it", [])
        _, commit_id, names = max(cached)
        return commit_id, dict.fromkeys(names, _File())

    def cache(self) -> Path:
        """Returns the folder of the Hub's cache that is this repository's."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        folder = self.call(repo_folder_name, repo_id=self.id, repo_type=self.kind)
        return Path(constants.HF_HUB_CACHE, folder)

    def download(self, commit: str, name: str, tqdm_class: type | None = None) -> Path:
        from huggingface_hub import hf_hub_download

        which = {"repo_type": self.kind, "revision": commit, "tqdm_class": tqdm_class}
        return Path(self.call(hf_hub_download, self.id, name, **which))

    def download_all(self, commit: str, files: dict[str, _File], console: Console) -> list[Path]:
        """Downloads files with one progress bar, if there is room for all; returns their paths."""
        blobs = self.cache() / "blobs"
        missing = [file for file in files.values() if not (blobs / file.blob).exists()]
        missing_bytes = sum(file.num_bytes for file in missing)
        fix = "Free some space, or set HF_HOME to a folder on a larger disk."
        require_free_space(blobs, missing_bytes, f"the files of {self.id}", fix)
        if missing:
            what = f"{len(missing)} of {len(files)} files ({format_bytes(missing_bytes)})"
            console.print(f"downloading {what} of {self.id} at {commit[:12]}")
        total_bytes = sum(file.num_bytes for file in files.values())
        paths = []
        with DownloadProgress(len(files), total_bytes, console) as progress:
            for name, file in files.items():
                with progress.file(file.num_bytes):
                    paths.append(self.download(commit, name, progress.tqdm_class()))
        return paths

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls huggingface_hub; tries again what may pass, and explains the rest."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        for attempt in range(_NUM_TRIES):
            try:
                return function(*args, **options)
            except Exception as raised:  # noqa: BLE001 - all of them are explained
                error: BaseException = raised
                while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
                    error = error.__cause__
                pause = pause_seconds(error, attempt)
                if pause is None or attempt == _NUM_TRIES - 1:
                    # Not "from error": a message about a malformed header quotes the token.
                    raise self.error(
                        *explain(error, self.kind, self.id, self.needed_right)
                    ) from None
                time.sleep(pause)

    def require_all_parts(self, names: list[str]) -> None:
        """Checks that of files such as a-00000-of-00002.parquet none is missing, as in a cache."""
        totals = [int(match[1]) for name in names if (match := re.search(r"-of-(\d+)\.", name))]
        if len(totals) < max(totals, default=0):
            raise self.lacks(f"full set, only {len(totals)} of {max(totals)} parts", names)

    def lacks(self, what: str, has: list[str], code: ExitCode = ExitCode.NOT_FOUND) -> UserError:
        from huggingface_hub import constants

        what, fix = f"there is no {what}", f"There is: {', '.join(has[:40]) or 'nothing'}."
        if constants.HF_HUB_OFFLINE:  # the Hub itself may well have it
            return self.error(f"{what} in the cache", f"{fix} {_ONLINE}", ExitCode.NETWORK)
        return self.error(what, fix, code)

    def error(self, what: str, fix: str, exit_code: ExitCode) -> UserError:
        where = f"{self.kind} {self.id}" + (f" at {self.revision}" if self.revision else "")
        return UserError(what, where=where, fix=fix, exit_code=exit_code)


def _describe(file: Any) -> _File:
    """Returns what the Hub says of a file: large ones are kept under their SHA-256."""
    return _File(file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "")


class _Files(msgspec.Struct):
    split: str
    path: str | list[str]


class _Config(msgspec.Struct):
    config_name: str
    data_files: str | list[str | _Files] = []


def _configs_by_card(card: Path | None) -> dict[str, dict[str, list[str]]]:
    """Returns configuration -> split -> patterns, as the `configs` in a dataset card say."""
    configs: dict[str, dict[str, list[str]]] = {}
    try:
        metadata = read_front_matter(card) if card else {}
        entries = msgspec.convert(metadata.get("configs", []), list[_Config])
    except (ValueError, OSError):  # a card without readable metadata names no files
        return configs
    for entry in entries:
        splits = configs.setdefault(entry.config_name, {})
        files = entry.data_files
        for file in files if isinstance(files, list) else [files]:
            one = _Files("train", file) if isinstance(file, str) else file
            paths = one.path if isinstance(one.path, list) else [one.path]
            splits.setdefault(one.split, []).extend(paths)
    return configs


def _configs_by_folder(names: list[str]) -> dict[str, dict[str, list[str]]]:
    """Returns configuration -> split -> patterns, by the layout CONFIG/SPLIT-*.parquet."""
    configs: dict[str, dict[str, list[str]]] = {}
    for name in names:
        if match := re.fullmatch(r"(.+)/([^/-]+)-[^/]*\.parquet", name):
            configs.setdefault(match[1], {})[match[2]] = [f"{match[1]}/{match[2]}-*.parquet"]
    return configs


def _matches(name: str, pattern: str) -> bool:
    same_depth = "**" in pattern or name.count("/") == pattern.count("/")
    return same_depth and fnmatchcase(name, pattern)
