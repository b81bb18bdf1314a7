"""The manifest's entry `source`: which text a chunk directory was made of.

    {"kind": "sample" or "files", "sha256": {NAME: SHA-256, ...}}
    {"kind": "hub", "dataset": OWNER/NAME, "config": ..., "revision": COMMIT, "files": [...],
     "blobs": [...]}
    {"kind": "several", "sources": [...]}     of the two kinds above, in reading order

`blobs` are, for each of the files, the SHA-256 of its content (64 digits), or git's SHA-1 (40),
which the file that was read had. With `--licence` each has a `licence`. Of `--source
hub:OWNER/NAME` there is also:

    split       the name of the split
    licence     what the dataset's card says: the Hub's id of a licence, or several; or null

`files` are names in the repository. In all other entries, such as `documents_per_file`, and in
messages, files have the names that `list_source_files` returns.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any


def list_sources(description: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the entries of all sources that a manifest's entry `source` stands for."""
    entries: list[dict[str, Any]] = description.get("sources", [description])
    return entries


def list_source_files(description: dict[str, Any]) -> list[str]:
    """Returns the names of all files of a manifest's entry `source`, in reading order."""
    names: list[str] = []
    for entry in list_sources(description):
        if "sha256" in entry:
            names += entry["sha256"]
        elif "split" in entry:
            names += [hub_file_name(entry["dataset"], name) for name in entry["files"]]
        else:
            names += entry["files"]
    return names


def hub_file_name(dataset: str, name: str) -> str:
    """Returns the name under which a file of `hub:DATASET` is counted and stands in messages."""
    return f"hub:{dataset}/{name}"


def describe_source(entry: dict[str, Any]) -> str:
    """Returns what one of the entries is, in a few words."""
    if entry["kind"] == "files":
        files = list_source_files(entry)
        name = PurePath(files[0]).name
        return f"{len(files):,} local files, such as {name}" if files[1:] else f"local file {name}"
    if entry["kind"] == "sample":
        return "the built-in sample"
    keys = ("dataset", "config", "split", "revision")
    parts = [f"{key} {entry[key]}" for key in keys if entry.get(key)]
    return ", ".join(parts) or str(entry["kind"])


def show_licence(licence: str | list[str] | None) -> str:
    """Returns an entry's licence, or licences, as text."""
    return ", ".join([licence] if isinstance(licence, str) else licence or ["not stated"])
