"""A small Hugging Face Hub on 127.0.0.1, enough for the real huggingface_hub client.

    with HubServer({"google/gemma-3-1b-pt": {"config.json": b"{}"}}) as hub:
        environment = hub.environment(tmp_path / "cache")

Start the client in a subprocess with that environment: huggingface_hub reads it when imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, final
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import File, Repo, is_lfs, metadata, tree_of
from hub_uploads import answer_upload

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_API = re.compile(
    rf"/api/(?P<type>models|datasets)/{_REPO}(?:/(?P<action>revision|tree)/(?P<rev>[^/]+)(?P<path>/.+)?)?"
)
_RESOLVE = re.compile(rf"/(?P<type>datasets/)?{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")


@dataclass
class _Fault:
    match: str
    times: int
    status: int = 0
    retry_after: int | None = None
    cut_after: int = 0
    reset: bool = False


@final
class HubServer:
    """The server; it runs for as long as its context is entered.

    Args:
        repos: repository -> its files, as a folder or as file name -> bytes. Models are called
            "owner/name", datasets "datasets/owner/name".
        gated: repositories whose files need a token in `accepted`.
        open_cards: those of them whose README.md needs none.
        private: repositories that are hidden from all but tokens in `accepted`.
        tokens: login tokens that are valid.
        accepted: login tokens that are valid and whose owner accepted every licence.
        writers: login tokens that are valid and may create and change repositories.
        renamed: former names of repositories, with the present ones.

    Attributes:
        log: (method, path with query, whether a token was sent) of each request so far.
        times: when each of them came, in seconds.
        ranges: the Range header of each request that had one.
    """

    def __init__(
        self,
        repos: Mapping[str, Path | Mapping[str, bytes]],
        *,
        gated: Collection[str] = (),
        open_cards: Collection[str] = (),
        private: Collection[str] = (),
        tokens: Collection[str] = (),
        accepted: Collection[str] = (),
        writers: Collection[str] = (),
        renamed: Mapping[str, str] | None = None,
    ):
        self.gated, self.private = set(gated), set(private)
        self.open_cards = set(open_cards)
        self.tokens, self.accepted = {*tokens, *accepted, *writers}, {*accepted, *writers}
        self.writers, self.uploaded = set(writers), dict[str, bytes]()
        self.renamed = dict(renamed or {})
        self.log: list[tuple[str, str, bool]] = []
        self.times: list[float] = []
        self.ranges: list[str] = []
        self._repos: dict[str, Repo] = {}
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        for name, files in repos.items():
            self.commit(name, files)
        # Big files come from another host, as on the real Hub: tokens must not follow there.
        self._servers = [_Server(self), _Server(self)]

    @property
    def url(self) -> str:
        return self._servers[0].url

    @property
    def cdn_url(self) -> str:
        return self._servers[1].url.replace("127.0.0.1", "localhost")

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, cache_dir: Path, token: str | None = None) -> dict[str, str]:
        """Returns variables that lead huggingface_hub here and to nothing of the user's own."""
        proxies = (
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        )
        return {
            **dict.fromkeys(proxies, ""),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache_dir),
            "HF_HUB_CACHE": str(cache_dir / "hub"),
            "HF_DATASETS_CACHE": str(cache_dir / "datasets"),
            "HF_TOKEN_PATH": str(cache_dir / "token"),
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def commit(self, name: str, files: Path | Mapping[str, bytes], branch: str = "main") -> str:
        """Makes a commit that replaces all files of a repository; returns its id."""
        if isinstance(files, Path):
            found = sorted(path for path in files.rglob("*") if path.is_file())
            tree = {path.relative_to(files).as_posix(): File(path) for path in found}
        else:
            tree = {path: File(content) for path, content in sorted(files.items())}
        listing = "".join(f"{path} {file.blob_id}\n" for path, file in tree.items())
        commit = hashlib.sha1(f"{name}\n{listing}".encode()).hexdigest()
        repo = self._repos.setdefault(name, Repo())
        repo.commits[commit] = tree
        repo.branches[branch] = commit
        return commit

    def fail(
        self, status: int, times: int = 1, *, retry_after: int | None = None, match: str = ""
    ) -> None:
        """Answers the next `times` requests whose path contains `match` with an HTTP status."""
        self._faults.append(_Fault(match, times, status=status, retry_after=retry_after))

    def cut(self, after: int, times: int = 1, *, match: str = "", reset: bool = False) -> None:
        """Ends the connection `after` bytes of the body of a matching GET; `reset`: with a RST."""
        self._faults.append(_Fault(match, times, cut_after=after, reset=reset))

    def clear_faults(self) -> None:
        """Forgets the faults that are still to come."""
        self._faults.clear()

    def take_fault(self, path: str, *, is_cut: bool) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.match in path and fault.times > 0 and (fault.status == 0) == is_cut:
                    fault.times -= 1
                    return fault
        return None

    def find_repo(self, name: str) -> Repo | None:
        return self._repos.get(name)

    def contents(self, name: str) -> dict[str, bytes]:
        """Returns the files of a repository's newest commit."""
        found = self._repos[name].files("main")
        return {path: file.content for path, file in found[1].items()} if found else {}

    def find_blob(self, sha256: str) -> File | None:
        trees = (tree for repo in self._repos.values() for tree in repo.commits.values())
        files = (file for tree in trees for file in tree.values())
        return next((file for file in files if file.sha256 == sha256), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer):
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Says nothing when a client is killed in the middle of a request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._receive()

    def do_PUT(self) -> None:
        self._receive()

    def _receive(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.hub.log.append((self.command, self.path, bool(token)))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, value = answer_upload(self.server.hub, self.path, token, body)
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        path = unquote(url.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.log.append((self.command, self.path, bool(token)))
        hub.times.append(time.monotonic())
        if requested := self.headers.get("Range"):
            hub.ranges.append(requested)
        if fault := hub.take_fault(self.path, is_cut=False):
            wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            self._error(fault.status, f"Fault {fault.status}", headers=wait)
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            file = hub.find_blob(match[1])
            if file is None:
                self._error(404, "Not found")
            else:
                self._send_file(file, {"ETag": f'"{file.sha256}"'})
        elif token and token not in hub.tokens:
            self._error(401, "Invalid credentials in Authorization header")
        elif new_path := self._new_path(url.path):
            query = f"?{url.query}" * bool(url.query)
            self._send(307, b"", {"Location": new_path + query})
        elif match := _API.fullmatch(url.path):
            self._api(match, token, parse_qs(url.query))
        elif match := _RESOLVE.fullmatch(url.path):
            self._resolve(match, token)
        else:
            self._error(404, "Sorry, we can't find the page you are looking for.")

    def _new_path(self, path: str) -> str | None:
        """Returns where a path of a renamed repository leads."""
        for old, new in self.server.hub.renamed.items():
            for start in ("/api/", "/"):
                if f"{path}/".startswith(f"{start}{old}/"):
                    return path.replace(old, new, 1)
        return None

    def _api(self, match: re.Match[str], token: str, query: dict[str, list[str]]) -> None:
        prefix = "datasets/" if match["type"] == "datasets" else ""
        name = prefix + match["repo"]
        found = self._files(name, token, unquote(match["rev"] or "main"))
        if found is None:
            return
        commit, files = found
        if match["action"] == "tree":
            folder = unquote(match["path"] or "").strip("/")
            entries = tree_of(
                files, folder, query.get("recursive", ["false"])[0].lower() in ("true", "1")
            )
            if folder and not entries:
                headers = {"X-Repo-Commit": commit}
                self._error(404, f"{folder} does not exist on {commit}", "EntryNotFound", headers)
            else:
                self._send_json(entries)
            return
        sizes = "blobs" in query
        siblings = [
            {"rfilename": path, **(metadata(path, file) if sizes else {})}
            for path, file in files.items()
        ]
        self._send_json(
            {
                "_id": commit[:24],
                "id": match["repo"],
                "sha": commit,
                "private": name in self.server.hub.private,
                "gated": "manual" if name in self.server.hub.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def _resolve(self, match: re.Match[str], token: str) -> None:
        hub, name = self.server.hub, (match["type"] or "") + match["repo"]
        found = self._files(name, token, unquote(match["rev"]))
        if found is None:
            return
        (commit, files), path = found, unquote(match["path"])
        headers = {"X-Repo-Commit": commit}
        is_open = path == "README.md" and name in hub.open_cards
        is_gated = name in hub.gated and not is_open
        if is_gated and not token:
            message = (
                f"Access to {name} is restricted. You must have access to it and be "
                "authenticated to access it. Please log in."
            )
            self._error(401, message, "GatedRepo", headers)
        elif is_gated and token not in hub.accepted:
            message = (
                f"Access to {name} is restricted and you are not in the authorized list. "
                f"Visit https://huggingface.co/{name} to ask for access."
            )
            self._error(403, message, "GatedRepo", headers)
        elif path not in files:
            self._error(404, "Entry not found", "EntryNotFound", headers)
        elif is_lfs(path, files[path]):
            file = files[path]
            headers |= {
                "X-Linked-Etag": f'"{file.sha256}"',
                "X-Linked-Size": str(len(file.content)),
            }
            headers["Location"] = f"{hub.cdn_url}/cdn/{file.sha256}"
            self._send(302, b"", headers)
        else:
            self._send_file(files[path], headers | {"ETag": f'"{files[path].blob_id}"'})

    def _files(self, name: str, token: str, revision: str) -> tuple[str, dict[str, File]] | None:
        """Finds what a revision holds, or answers the request with the Hub's refusal."""
        hub = self.server.hub
        repo = hub.find_repo(name)
        if repo is None or (name in hub.private and token not in hub.accepted):
            if token:
                self._error(404, "Repository not found", "RepoNotFound")
            else:
                self._error(401, "Invalid username or password.", "RepoNotFound")
            return None
        found = repo.files(revision)
        if found is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _error(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        named = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        headers = {**(headers or {}), **named, "X-Error-Message": message}
        self._send(status, body, {**headers, "Content-Type": "application/json"})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, file: File, headers: dict[str, str]) -> None:
        total = len(file.content)
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, file.content, headers)
        elif int(asked[1]) >= total:
            self._send(416, b"", {**headers, "Content-Range": f"bytes */{total}"})
        else:
            first, last = int(asked[1]), min(int(asked[2] or total), total - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
            self._send(206, file.content[first : last + 1], headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD" or not body:
            return
        fault = self.server.hub.take_fault(self.path, is_cut=True) if status < 300 else None
        if fault is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.cut_after])
        if fault.reset:
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        self.close_connection = True
