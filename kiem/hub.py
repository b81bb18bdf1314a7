"""Downloads from and uploads to the Hugging Face Hub, with every error explained.

Files go into the Hub's own cache. All files of a download belong to one commit. With
HF_HUB_OFFLINE=1 the newest cached commit is used.
"""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import format_bytes, require_free_space

_MODEL_FILES = (
    *("README.md", "config.json", "generation_config.json"),
    *("*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
_LOG_IN = "run `hf auth login` or set HF_TOKEN (tokens: https://huggingface.co/settings/tokens)"
_LOCAL = "or name local files or a local folder instead."
_AGAIN = "Run it again; files that are complete are not downloaded again."
_MAX_TRIES, _MAX_PAUSE_SECONDS = 6, 60
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_TRANSIENT_ERRORS = ("ReadError", "ReadTimeout", "RemoteProtocolError")


def looks_like_hub_id(name: str) -> bool:
    """Says whether a name that is no existing path can be an OWNER/NAME on the Hub."""
    is_path = name.startswith((".", "/", "~", "-")) or name.endswith(".json")
    return not is_path and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


@dataclass(frozen=True)
class HubFiles:
    """Downloaded files: their commit, where they are on disk, and their names on the Hub."""

    revision: str
    paths: list[Path]
    names: list[str]


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
        UserError: not there, no access, no network, or no room on the disk.
    """
    repo, pattern = _Repo("dataset", dataset, revision), f"{config}/train-*.parquet"
    commit, files = repo.list_files(pattern)
    chosen = sorted(matching(files, pattern))
    if not chosen:
        raise repo.lacks(pattern, list(files))
    repo.require_all_parts(chosen)
    folder = repo.download(commit, files, chosen, console)
    return HubFiles(commit, [folder / name for name in chosen], chosen)


def download_tokenizer(repo: str, revision: str | None = None) -> HubFiles:
    """Downloads the tokenizer.json of a model.

    Raises:
        UserError: as `download_dataset_files`.
    """
    model, name = _Repo("model", repo, revision), "tokenizer.json"
    commit, files = model.list_files(name)
    if name not in files:
        raise model.lacks(name, list(files))
    return HubFiles(commit, [model.download(commit, files, [name]) / name], [name])


def download_model(repo: str) -> Path:
    """Downloads a model's card, configuration, weights and tokenizer; returns their folder.

    Raises:
        UserError: as `download_dataset_files`, or the repository holds no such model.
    """
    model = _Repo("model", repo)
    commit, files = model.list_files("config.json")
    top = [name for name in files if "/" not in name]
    weights = matching(top, "*.safetensors")
    if "config.json" not in top or not weights:
        raise model.lacks("config.json with *.safetensors", list(files), ExitCode.NOT_A_MODEL)
    model.require_all_parts(weights)
    wanted = [name for pattern in _MODEL_FILES for name in matching(top, pattern)]
    return model.download(commit, files, wanted)


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

    model, api = _Repo("model", repo), HfApi()
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
    kind: Literal["dataset", "model"]
    id: str
    revision: str | None = None

    def list_files(self, needed: str) -> tuple[str, dict[str, Any]]:
        """Returns a commit and its files, as the Hub describes them.

        Offline that is the newest cached commit, if possible one with `needed`; its files have
        None as their description.
        """
        from huggingface_hub import HfApi, constants

        if not constants.HF_HUB_OFFLINE:
            options = {"repo_type": self.kind, "revision": self.revision, "timeout": 30}
            info = self.call(HfApi().repo_info, self.id, files_metadata=True, **options)
            return info.sha, {file.rfilename: file for file in info.siblings or []}
        cached = []
        for commit in (self.cache / "snapshots").glob(self.revision or "*"):
            paths = [path for path in commit.rglob("*") if path.is_file()]
            names = sorted(path.relative_to(commit).as_posix() for path in paths)
            cached.append((bool(matching(names, needed)), commit.stat().st_mtime, commit, names))
        if not cached:
            raise self.lacks("copy of it", [])
        *_, newest, names = max(cached)
        return newest.name, dict.fromkeys(names)

    @property
    def cache(self) -> Path:
        """The folder of this repository in the Hub's cache."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE, f"{self.kind}s--{self.id.replace('/', '--')}")

    def download(
        self, commit: str, files: dict[str, Any], names: list[str], console: Console | None = None
    ) -> Path:
        """Downloads what is missing of some files in parallel; returns the commit's folder."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        folder, blobs = self.cache / "snapshots" / commit, self.cache / "blobs"
        described = [files[name] for name in names if not (folder / name).is_file()]
        if not described:
            return folder
        # Large files are kept under their SHA-256, and shared by commits.
        by_blob = {str(f.lfs.sha256 if f.lfs else f.blob_id): f.size or 0 for f in described}
        sizes = [size for blob, size in by_blob.items() if not (blobs / blob).exists()]
        fix = "Free some space, or set HF_HOME to a folder on a larger disk."
        require_free_space(blobs, sum(sizes), f"the files of {self.id}", fix)
        if console and sizes:
            what = f"{len(sizes)} of {len(names)} files ({format_bytes(sum(sizes))})"
            console.print(f"downloading {what} of {self.id} at {commit[:12]}")
        if not sys.stderr.isatty():
            disable_progress_bars()
        which = {"repo_type": self.kind, "revision": commit, "allow_patterns": names}
        self.call(snapshot_download, self.id, **which)
        # If the Hub does not list its files, snapshot_download is content with what is there.
        if not all((folder / name).is_file() for name in names):
            raise self.error("the Hub does not list its files", _AGAIN, ExitCode.NETWORK)
        return folder

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls huggingface_hub, again after a transient error; explains any other error."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        for attempt in range(_MAX_TRIES):
            try:
                return function(*args, **options)
            except Exception as raised:  # noqa: BLE001 - all of them are explained
                error: BaseException = raised
                while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
                    error = error.__cause__
                response = getattr(error, "response", None)
                asked = getattr(response, "headers", {}).get("Retry-After", "")
                pause = int(asked) if asked.isdigit() else 2**attempt
                is_transient = getattr(response, "status_code", 0) in _TRANSIENT_STATUS
                is_transient = is_transient or type(error).__name__ in _TRANSIENT_ERRORS
                if not is_transient or pause > _MAX_PAUSE_SECONDS or attempt + 1 == _MAX_TRIES:
                    # Not "from error": a message about a malformed header quotes the token.
                    raise self.error(*self.explain(error)) from None
                time.sleep(pause)

    def require_all_parts(self, names: list[str]) -> None:
        """Checks that no file such as a-00000-of-00002.parquet is missing, as in a cache."""
        totals = [int(match[1]) for name in names if (match := re.search(r"-of-(\d+)\.", name))]
        if len(totals) < max(totals, default=0):
            raise self.lacks(f"full set, only {len(totals)} of {max(totals)} parts", names)

    def lacks(self, what: str, has: list[str], code: ExitCode = ExitCode.NOT_FOUND) -> UserError:
        from huggingface_hub import constants

        what, fix = f"there is no {what}", f"There is: {', '.join(has[:40]) or 'nothing'}."
        if not constants.HF_HUB_OFFLINE:
            return self.error(what, fix, code)
        fix += f" Run it once without HF_HUB_OFFLINE, {_LOCAL}"
        return self.error(f"{what} in the cache", fix, ExitCode.NETWORK)

    def error(self, what: str, fix: str, exit_code: ExitCode) -> UserError:
        where = f"{self.kind} {self.id}" + (f" at {self.revision}" if self.revision else "")
        return UserError(what, where=where, fix=fix, exit_code=exit_code)

    def explain(self, error: BaseException) -> tuple[str, str, ExitCode]:
        """Returns what went wrong, what to do about it, and the exit code."""
        from huggingface_hub import constants, errors

        response, number = getattr(error, "response", None), getattr(error, "errno", None)
        status = getattr(response, "status_code", None)
        has_token = response is not None and "authorization" in response.request.headers
        page = f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.id}"
        cache = constants.HF_HUB_CACHE
        # What the Hub answers
        if isinstance(error, errors.GatedRepoError) and not has_token:
            what = "you are not logged in, and it has a licence to accept"
            return what, f"Accept the licence on {page}, then {_LOG_IN}.", ExitCode.HUB_LOGIN
        if isinstance(error, errors.GatedRepoError) and status == 403:
            fix = f"Accept it on {page}. A fine-grained token must be allowed gated repositories."
            return "your account has not accepted its licence", fix, ExitCode.HUB_LICENCE
        if status in (401, 403) and has_token:
            fix = f"Use one that may read it, or for an upload may write to it: {_LOG_IN}."
            return f"the Hub refuses your login token ({status})", fix, ExitCode.HUB_LOGIN
        if status == 401:
            fix = f"Check the name on {page}. If it is private, {_LOG_IN}."
            what = "it does not exist, or it is private and you are not logged in"
            return what, fix, ExitCode.HUB_LOGIN
        if status == 404:
            thing = "revision" if isinstance(error, errors.RevisionNotFoundError) else self.kind
            return f"the Hub has no such {thing}", f"Check the name on {page}.", ExitCode.NOT_FOUND
        if status:
            return f"the Hub answers with error {status}", _AGAIN, ExitCode.NETWORK
        # What this machine or the options refuse
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            fix = f"Free some space in {cache}, or set HF_HOME to a larger disk."
            return "the disk is full", fix, ExitCode.DISK_SPACE
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            fix = f"Make {cache} writable, or set HF_HOME to another folder."
            return "the cache folder cannot be written", fix, ExitCode.NOT_WRITABLE
        if isinstance(error, errors.HFValidationError):
            return "this is not a Hub name", "Write it as OWNER/NAME.", ExitCode.BAD_OPTION
        if type(error).__name__ in ("UnicodeEncodeError", "LocalProtocolError"):
            return "your login token is damaged", f"Repair it: {_LOG_IN}.", ExitCode.HUB_LOGIN
        # Everything else; the reason must not show a token
        reason = re.sub(r"(hf_|Bearer |://)[^\s'\"]+", r"\1***", f"{type(error).__name__}: {error}")
        fix = f"Check the network. {_AGAIN} Or set HF_HUB_OFFLINE=1 to use the cache, {_LOCAL}"
        return f"no connection to the Hub ({reason[:200]})", fix, ExitCode.NETWORK
