"""A repository on the Hugging Face Hub: listings, downloads, and every error explained."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import format_bytes, require_free_space, sha256_file

_LOG_IN = "run `hf auth login` or set HF_TOKEN (tokens: https://huggingface.co/settings/tokens)"
_LOCAL = "or name local files or a local folder instead."
_AGAIN = "Run it again; files that are complete are not downloaded again."
_MAX_TRIES, _MAX_PAUSE_SECONDS = 6, 60
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_TRANSIENT_ERRORS = ("ReadError", "ReadTimeout", "RemoteProtocolError")


class RemoteFile(NamedTuple):
    """A file of a repository at a commit.

    Attributes:
        repo: the Hub id of the repository.
        commit: the commit's id.
        name: its name in the repository.
        num_bytes: its size.
        blob: what identifies its content: the SHA-256 of a large file, git's SHA-1 of another.
    """

    repo: str
    commit: str
    name: str
    num_bytes: int
    blob: str


def blob_of(path: Path, num_digits: int) -> str:
    """Returns what identifies a file's content on the Hub: git's SHA-1 (40 digits) or SHA-256."""
    if num_digits != 40:
        return sha256_file(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Repo:
    """A repository.

    Attributes:
        kind: what it is.
        id: its name, OWNER/NAME.
        revision: a branch, tag or commit; None: the newest commit.
        place: the folder into which files are downloaded; None: the Hub's cache.
    """

    kind: Literal["dataset", "model"]
    id: str
    revision: str | None = None
    place: Path | None = None

    def list_files(self, needed: str) -> tuple[str, dict[str, RemoteFile]]:
        """Returns a commit and its files by name; offline, as `newest_cached`."""
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            return self.newest_cached(needed)
        options = {"repo_type": self.kind, "revision": self.revision, "timeout": 30}
        info = self.call(HfApi().repo_info, self.id, files_metadata=True, **options)
        files = [self.described(info.sha, file) for file in info.siblings or []]
        return info.sha, {file.name: file for file in files}

    def newest_cached(self, needed: str = "*") -> tuple[str, dict[str, RemoteFile]]:
        """Returns the newest cached commit and its cached files, if possible with `needed`."""
        cached = []
        for commit in (self.cache / "snapshots").glob(self.revision or "*"):
            paths = [path for path in commit.rglob("*") if path.is_file()]
            named = sorted((path.relative_to(commit).as_posix(), path) for path in paths)
            is_wanted = bool(matching([name for name, _ in named], needed))
            cached.append((is_wanted, commit.stat().st_mtime, commit.name, named))
        if not cached:
            raise self.lacks("copy of it", [])
        *_, commit_id, named = max(cached)
        # Blobs have the names that identify them.
        return commit_id, {
            name: RemoteFile(self.id, commit_id, name, path.stat().st_size, path.resolve().name)
            for name, path in named
        }

    def described(self, commit: str, file: Any) -> RemoteFile:
        """Returns a file as huggingface_hub describes it."""
        blob = str(file.lfs.sha256 if file.lfs else file.blob_id)
        return RemoteFile(self.id, commit, file.rfilename, file.size or 0, blob)

    @property
    def cache(self) -> Path:
        """The folder of this repository in the Hub's cache."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE, f"{self.kind}s--{self.id.replace('/', '--')}")

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit's files in the Hub's cache."""
        return self.cache / "snapshots" / commit

    def download(self, files: Sequence[RemoteFile], console: Console | None = None) -> Path:
        """Downloads what is missing of some files of a commit, in parallel; returns their folder.

        Args:
            files: at least one.
            console: for a line about what is downloaded.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        commit = files[0].commit
        folder, blobs = self.place or self.snapshot(commit), self.cache / "blobs"
        missing = [file for file in files if not (folder / file.name).is_file()]
        if not missing:
            return folder
        sizes = [file.num_bytes for file in missing]
        if self.place is None:
            # Files of equal content are one blob there, also those of several commits.
            by_blob = {file.blob: file.num_bytes for file in missing}
            sizes = [size for blob, size in by_blob.items() if not (blobs / blob).exists()]
        else:
            # Otherwise large files may be kept in pieces as well.
            os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        where, what = self.place or blobs, f"the files of {self.id}"
        require_free_space(where, sum(sizes), what, f"Free some space, or {self.other_disk}.")
        if console and sizes:
            what = f"{len(sizes)} of {len(files)} files ({format_bytes(sum(sizes))})"
            console.print(f"downloading {what} of {self.id} at {commit[:12]}")
        if not sys.stderr.isatty():
            disable_progress_bars()
        names = [glob.escape(file.name) for file in files]
        which = {"repo_type": self.kind, "revision": commit, "allow_patterns": names}
        self.call(snapshot_download, self.id, local_dir=self.place, **which)
        # If the Hub does not list its files, snapshot_download is content with what is there.
        if not all((folder / file.name).is_file() for file in files):
            raise self.error("the Hub does not list its files", _AGAIN, ExitCode.NETWORK)
        return folder

    @property
    def other_disk(self) -> str:
        """How files get to another disk."""
        if self.place is not None:
            return "choose an --output-dir on another disk"
        return "set HF_HOME to a folder on another disk"

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
        is_commit = re.fullmatch("[0-9a-f]{40}", self.revision or "")
        revision = self.revision[:12] if self.revision and is_commit else self.revision
        where = f"{self.kind} {self.id}" + (f" at {revision}" if revision else "")
        return UserError(what, where=where, fix=fix, exit_code=exit_code)

    def explain(self, error: BaseException) -> tuple[str, str, ExitCode]:
        """Returns what went wrong, what to do about it, and the exit code."""
        from huggingface_hub import constants, errors

        response, number = getattr(error, "response", None), getattr(error, "errno", None)
        status = getattr(response, "status_code", None)
        has_token = response is not None and "authorization" in response.request.headers
        page = f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.id}"
        cache = self.place or constants.HF_HUB_CACHE
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
            fix = f"Free some space in {cache}, or {self.other_disk}."
            return "the disk is full", fix, ExitCode.DISK_SPACE
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            fix = f"Make {cache} writable, or {self.other_disk}."
            return "the cache folder cannot be written", fix, ExitCode.NOT_WRITABLE
        if isinstance(error, errors.HFValidationError):
            return "this is not a Hub name", "Write it as OWNER/NAME.", ExitCode.BAD_OPTION
        if type(error).__name__ in ("UnicodeEncodeError", "LocalProtocolError"):
            return "your login token is damaged", f"Repair it: {_LOG_IN}.", ExitCode.HUB_LOGIN
        # Everything else; the reason must not show a token
        reason = re.sub(r"(hf_|Bearer |://)[^\s'\"]+", r"\1***", f"{type(error).__name__}: {error}")
        fix = f"Check the network. {_AGAIN} Or set HF_HUB_OFFLINE=1 to use the cache, {_LOCAL}"
        return f"no connection to the Hub ({reason[:200]})", fix, ExitCode.NETWORK
