"""The manifest.json of a folder: SHA-256 of its files and of itself, checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from kiem.core.errors import damaged
from kiem.core.files import sha256_file, to_json, write_json
from kiem.core.json_input import parse_json

MANIFEST_FILE = "manifest.json"
# A file inside the folder, or in a folder directly inside it.
FileName = Annotated[str, msgspec.Meta(pattern=r"^(\w+/)?\w[\w.-]*$")]


class Entry(msgspec.Struct):
    """The size and the hash that a file must have."""

    bytes: int
    sha256: str


class _Manifest(msgspec.Struct):
    files: dict[FileName, Entry]
    sha256: str


def write_manifest(
    folder: Path, known: Mapping[str, str] | None = None, without: tuple[str, ...] = ()
) -> None:
    """Writes the manifest of an unfinished folder; the last file to be written into it.

    Args:
        folder: a folder that `files.new_folder` made.
        known: SHA-256 of files, by name, as they were meant to be written; others are read.
        without: files that people may change afterwards.
    """
    known = known or {}
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": known.get(path.name) or sha256_file(path),
        }
        for path in sorted(folder.iterdir())
        if path.name not in (*without, MANIFEST_FILE)
    }
    write_content(folder, {"files": files})


def write_content(folder: Path, content: dict[str, Any]) -> None:
    """Writes a manifest with any content and the SHA-256 of that content."""
    write_json(folder / MANIFEST_FILE, {**content, "sha256": _sha256_of(content)})


def read_content(folder: Path) -> tuple[Any, bool]:
    """Returns the JSON of a manifest, and whether it is byte for byte as it was written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    written = (folder / MANIFEST_FILE).read_bytes()
    content = parse_json(written)
    if not isinstance(content, dict) or to_json(content).encode() != written:
        return content, False
    unsealed = {name: value for name, value in content.items() if name != "sha256"}
    return content, content.get("sha256") == _sha256_of(unsealed)


def read_manifest(folder: Path, fix: str) -> dict[str, Entry]:
    """Returns what a manifest of `write_manifest` says of each file.

    Args:
        folder: with the manifest.
        fix: what to do about damage.

    Raises:
        UserError: the manifest is missing or damaged; names it.
    """
    where = str(folder / MANIFEST_FILE)
    try:
        content, is_intact = read_content(folder)
        manifest = msgspec.convert(content, _Manifest)
    except OSError as error:
        raise damaged(where, f"damaged: it cannot be read ({error.strerror})", fix) from error
    except ValueError as error:
        raise damaged(where, f"damaged: not a manifest ({error})", fix) from error
    if not is_intact:
        raise damaged(where, "damaged: its content has another sha256 than it says", fix)
    return manifest.files


def verify_manifest(folder: Path, fix: str, without: tuple[str, ...] = ()) -> None:
    """Checks the files of a folder against its manifest, and the manifest against itself.

    Args:
        folder: a folder with a manifest of `write_manifest`.
        fix: what to do about damage.
        without: files that are not looked at.

    Raises:
        UserError: a file is missing or damaged; names it.
    """
    for name, entry in read_manifest(folder, fix).items():
        if name not in without:
            verify_file(folder / name, entry.sha256, entry.bytes, fix=fix)


def verify_file(path: Path, sha256: str, num_bytes: int | None = None, *, fix: str) -> None:
    """Checks a file against the SHA-256, and the size if it is there, that a manifest names.

    Raises:
        UserError: the file is missing or damaged.
    """

    try:
        found = path.stat().st_size
        if num_bytes not in (None, found):
            what = f"{found} bytes, not {num_bytes}"
        elif sha256_file(path) != sha256:
            what = f"its sha256 differs from the one in {MANIFEST_FILE}"
        else:
            return
    except OSError as error:
        what = f"it cannot be read ({error.strerror})"
    raise damaged(str(path), f"damaged: {what}", fix)


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
