"""The only place that talks to the Hugging Face Hub: it brings files into the Hub's own cache.

A download is of one commit, so its files belong together. With HF_HUB_OFFLINE=1 the cache answers.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from kiem.errors import ExitCode, UserError

_MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
_ONLINE = "Run it once without HF_HUB_OFFLINE, or name local files or a local folder instead."
_LOG_IN = "run `hf auth login` or set HF_TOKEN (tokens: https://huggingface.co/settings/tokens)"
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_PASSING_ERRORS = ("ReadError", "ReadTimeout", "RemoteProtocolError", "ChunkedEncodingError")
_NUM_TRIES = 4
_MAX_PAUSE_SECONDS = 60


def looks_like_hub_id(name: str) -> bool:
    """Says whether a name that is no existing path can be an OWNER/NAME on the Hub."""
    is_path = name.startswith((".", "/", "~", "-")) or name.endswith(".json")
    return name.count("/") == 1 and not is_path


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


def download_dataset_files(dataset: str, config: str, split: str = "train") -> HubFiles:
    """Downloads the parquet files of one split and returns them in the order of their names.

    Args:
        dataset: the Hub id of a dataset.
        config: a configuration of the dataset's card or, if it names none, a folder.
        split: a split of the configuration.

    Raises:
        UserError: not there, no access, no network, or no room on the disk.
    """
    repo = _Repo("dataset", dataset)
    commit, names = repo.files(f"{config}/*")
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
    return HubFiles(commit, [repo.download(commit, name) for name in chosen], chosen)


def download_tokenizer(repo: str, revision: str | None = None) -> HubTokenizer:
    """Downloads tokenizer.json and, if there is one, tokenizer_config.json; returns where they are.

    Args:
        repo: the Hub id of a model.
        revision: a branch, tag or commit; by default the newest commit.

    Raises:
        UserError: as `download_dataset_files`.
    """
    model, config = _Repo("model", repo, revision), "tokenizer_config.json"
    commit, names = model.files("tokenizer.json")
    if "tokenizer.json" not in names:
        raise model.lacks("tokenizer.json", names)
    tokenizer_json = model.download(commit, "tokenizer.json")
    config_json = model.download(commit, config) if config in names else None
    return HubTokenizer(commit, tokenizer_json, config_json)


def download_model(repo: str) -> Path:
    """Downloads a model's configuration, safetensors weights and tokenizer; returns their folder.

    Args:
        repo: the Hub id of a model.

    Raises:
        UserError: as `download_dataset_files`, or the repository holds no such model.
    """
    from huggingface_hub import snapshot_download

    model = _Repo("model", repo)
    commit, names = model.files("config.json")
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


@dataclass(frozen=True)
class _Repo:
    type: str
    id: str
    revision: str | None = None
    needed_right: str = "read"

    def files(self, needed: str) -> tuple[str, list[str]]:
        """Returns a commit and its files; offline the newest cached one, best with `needed`."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.file_download import repo_folder_name

        if not constants.HF_HUB_OFFLINE:
            which = {"repo_type": self.type, "revision": self.revision, "timeout": 30}
            info = self.call(HfApi().repo_info, self.id, **which)
            return info.sha, [file.rfilename for file in info.siblings or []]
        folder = self.call(repo_folder_name, repo_id=self.id, repo_type=self.type)
        cached = []
        for commit in Path(constants.HF_HUB_CACHE, folder, "snapshots").glob(self.revision or "*"):
            paths = [path for path in commit.rglob("*") if path.is_file()]
            names = sorted(path.relative_to(commit).as_posix() for path in paths)
            rank = (bool(matching(names, needed)), commit.stat().st_mtime)
            cached.append((rank, commit.name, names))
        if not cached:
            raise self.lacks("copy of it", [])
        _, commit_id, names = max(cached)
        return commit_id, names

    def download(self, commit: str, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        which = {"repo_type": self.type, "revision": commit}
        return Path(self.call(hf_hub_download, self.id, name, **which))

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
                pause = _pause_seconds(error, attempt)
                if pause is None or attempt == _NUM_TRIES - 1:
                    # Not "from error": a message about a malformed header quotes the token.
                    raise self.error(*_explain(error, self)) from None
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
        where = f"{self.type} {self.id}" + (f" at {self.revision}" if self.revision else "")
        return UserError(what, where=where, fix=fix, exit_code=exit_code)


def _configs_by_card(card: Path | None) -> dict[str, dict[str, list[str]]]:
    """Returns configuration -> split -> patterns, as the `configs` in a dataset card say."""
    from huggingface_hub import metadata_load

    configs: dict[str, dict[str, list[str]]] = {}
    try:
        metadata = metadata_load(card) if card else None
    except (ValueError, yaml.YAMLError):  # a card without readable metadata names no files
        return configs
    for entry in (metadata or {}).get("configs", []):
        splits = configs.setdefault(str(entry["config_name"]), {})
        files = entry.get("data_files", [])
        for file in files if isinstance(files, list) else [files]:
            one = file if isinstance(file, dict) else {"split": "train", "path": file}
            paths = one["path"] if isinstance(one["path"], list) else [one["path"]]
            splits.setdefault(one["split"], []).extend(paths)
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


def _pause_seconds(error: BaseException, attempt: int) -> int | None:
    """Returns how long to wait before the next try, or None if that would not help."""
    response = getattr(error, "response", None)
    asked = getattr(response, "headers", {}).get("Retry-After", "")
    pause = int(asked) if asked.isdigit() else 2**attempt
    passes = getattr(response, "status_code", None) in _PASSING_STATUS
    passes = passes or type(error).__name__ in _PASSING_ERRORS
    return pause if passes and pause <= _MAX_PAUSE_SECONDS else None


def _explain(error: BaseException, repo: _Repo) -> tuple[str, str, ExitCode]:
    """Returns what went wrong in huggingface_hub, what to do about it, and the exit code."""
    from huggingface_hub import constants, errors

    response, number = getattr(error, "response", None), getattr(error, "errno", None)
    status = getattr(response, "status_code", None)
    has_token = response is not None and "authorization" in response.request.headers
    is_gated = isinstance(error, errors.GatedRepoError)
    page = f"https://huggingface.co/{'datasets/' * (repo.type == 'dataset')}{repo.id}"
    again = "Run it again; files that are complete are not downloaded again."
    if is_gated and not has_token:
        what = "you are not logged in, and it has a licence to accept"
        return what, f"Accept the licence on {page}, then {_LOG_IN}.", ExitCode.HUB_LOGIN
    if is_gated and status == 403:
        fix = f"Accept it on {page}. A fine-grained token must be allowed gated repositories too."
        return "your account has not accepted its licence", fix, ExitCode.HUB_LICENCE
    if status in (401, 403) and has_token:
        fix = f"Take a valid one that may {repo.needed_right} this {repo.type}: {_LOG_IN}."
        return f"the Hub refuses your login token ({status})", fix, ExitCode.HUB_LOGIN
    if status == 401:
        what = "it does not exist, or it is private and you are not logged in"
        return what, f"Check the name on {page}. If it is private, {_LOG_IN}.", ExitCode.HUB_LOGIN
    if status == 404:
        kind = "revision" if isinstance(error, errors.RevisionNotFoundError) else repo.type
        return f"the Hub has no such {kind}", f"Check the name on {page}.", ExitCode.NOT_FOUND
    if status == 429:
        fix = "Wait a few minutes and run it again. The Hub allows more to who is logged in."
        return "too many requests to the Hub (429)", fix, ExitCode.NETWORK
    if status:
        return f"the Hub answers with error {status}", again, ExitCode.NETWORK
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        fix = f"Free some space in {constants.HF_HUB_CACHE}, or set HF_HOME to a larger disk."
        return "the disk is full", fix, ExitCode.DISK_SPACE
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        fix = f"Make {constants.HF_HUB_CACHE} writable, or set HF_HOME to another folder."
        return "the cache folder cannot be written", fix, ExitCode.NOT_WRITABLE
    if isinstance(error, errors.HFValidationError):
        return "this is not a Hub name", "Write it as OWNER/NAME.", ExitCode.BAD_OPTION
    if type(error).__name__ in ("UnicodeEncodeError", "LocalProtocolError"):
        return "your login token is damaged", f"Repair it: {_LOG_IN}.", ExitCode.HUB_LOGIN
    reason = re.sub(r"(hf_|Bearer |://)[^\s'\"]+", r"\1***", f"{type(error).__name__}: {error}")
    fix = f"Check the network. {again} Without a network, set HF_HUB_OFFLINE=1 to use what is "
    fix += "already downloaded, or name local files or a local folder instead."
    return f"no connection to the Hub ({reason[:200]})", fix, ExitCode.NETWORK
