"""What the repositories of tests/hub_server.py hold, and how the Hub describes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".model")
LFS_MIN_BYTES = 10_000_000


@dataclass(frozen=True)
class File:
    source: bytes | Path

    @cached_property
    def content(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def files(self, revision: str) -> tuple[str, dict[str, File]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


def is_lfs(path: str, file: File) -> bool:
    return path.endswith(LFS_SUFFIXES) or len(file.content) >= LFS_MIN_BYTES


def metadata(path: str, file: File) -> dict[str, Any]:
    size = len(file.content)
    lfs = {"sha256": file.sha256, "size": size, "pointerSize": 134}
    return {"size": size, "blobId": file.blob_id, **({"lfs": lfs} if is_lfs(path, file) else {})}


def tree_of(files: Mapping[str, File], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(name.encode()).hexdigest()
            entries[name] = {"type": "directory", "oid": oid, "size": 0, "path": name}
        if len(parts) == 1 or recursive:
            size = len(file.content)
            entries[path] = {"type": "file", "oid": file.blob_id, "size": size, "path": path}
            if is_lfs(path, file):
                entries[path]["lfs"] = {"oid": file.sha256, "size": size, "pointerSize": 134}
    return list(entries.values())
