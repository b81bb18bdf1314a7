"""manifest.json of a folder: size and SHA-256 of its files, to be checked before they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import sha256_file, to_json, write_json
from kiem.core.json_input import parse_json

MANIFEST_FILE = "manifest.json"


class _Entry(msgspec.Struct):
    bytes: int
    sha256: str


class _Manifest(msgspec.Struct):
    files: dict[str, _Entry]
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
    write_json(folder / MANIFEST_FILE, {"files": files, "sha256": _sha256_of(files)})


def verify_manifest(folder: Path, fix: str) -> None:
    """Checks the files of a folder against its manifest, and the manifest against itself.

    Args:
        folder: a folder with a manifest.
        fix: what to do about damage.

    Raises:
        UserError: a file is missing or damaged; names it.
    """

    def damaged(name: str, what: str) -> UserError:
        where = str(folder / name)
        return UserError(f"damaged: {what}", where=where, fix=fix, exit_code=ExitCode.DAMAGED)

    try:
        written = (folder / MANIFEST_FILE).read_bytes()
        content = parse_json(written)
        manifest = msgspec.convert(content, _Manifest)
    except OSError as error:
        raise damaged(MANIFEST_FILE, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise damaged(MANIFEST_FILE, f"it is no manifest ({error})") from error
    if to_json(content).encode() != written or manifest.sha256 != _sha256_of(content["files"]):
        raise damaged(MANIFEST_FILE, "its content has another sha256 than it says")
    for name, entry in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
            if num_bytes != entry.bytes:
                raise damaged(name, f"{num_bytes} bytes, not {entry.bytes}")
            if sha256_file(folder / name) != entry.sha256:
                raise damaged(name, f"its sha256 differs from the one in {MANIFEST_FILE}")
        except OSError as error:
            raise damaged(name, f"it cannot be read ({error.strerror})") from error


def _sha256_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
