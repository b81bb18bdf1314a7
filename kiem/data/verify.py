"""Checks that a chunk directory is what its manifest says."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kiem.data.chunks import (
    MANIFEST_FILE,
    NO_SOURCE,
    REJECTED_FILE,
    TEST_SOURCES,
    damaged,
    open_split,
    open_test_sources,
    read_manifest,
    read_tokenizer,
    source_shards,
)
from kiem.files import sha256_file


def verify_directory(path: Path) -> dict[str, Any]:
    """Checks every hash and count of a chunk directory and returns its manifest.

    Raises:
        UserError: it is no chunk directory, or something in it is missing or damaged; names it.
    """
    manifest = read_manifest(path)
    if "sha256" not in manifest:
        raise damaged(path / MANIFEST_FILE, "has no sha256 of itself")
    read_tokenizer(path, manifest)
    for name, sha256 in manifest["files"].items():
        _verify_file(path / name, sha256)
    verify_shards(path, manifest)
    _verify_rejected(path, manifest)
    special, chunk_size = manifest["special_ids"], manifest["options"]["chunk_size"]
    num_documents = manifest["documents_read"] - sum(manifest["rejected"].values())
    for split, counts in manifest["splits"].items():
        num_documents -= counts["documents"]
        found: Counter[str] = Counter()
        for block in open_split(path, manifest, split).blocks:
            found["chunks"] += len(block)
            found["documents"] += int(np.count_nonzero(block == special["bos"]))
            found["padding_tokens"] += int(np.count_nonzero(block == special["pad"]))
        found["tokens"] = found["chunks"] * chunk_size - found["padding_tokens"]
        for name, number in found.items():
            if number != counts[name]:
                raise damaged(
                    path / MANIFEST_FILE,
                    f"says {counts[name]} {name} in the {split} split; there are {number}",
                )
    if num_documents != 0:
        raise damaged(path / MANIFEST_FILE, "has counts of documents that do not add up")
    _verify_sources(path, manifest)
    return manifest


def _verify_sources(path: Path, manifest: dict[str, Any]) -> None:
    """Checks that the test tokens of every source are as many as the manifest says."""
    sources, counts = open_test_sources(path, manifest), manifest["splits"]["test"]
    if sources is None:
        return
    names = counts["source_names"]
    found = np.zeros(len(names), dtype=np.int64)
    for block in sources.blocks:
        found += np.bincount(block[block != NO_SOURCE], minlength=len(names))
    if dict(zip(names, found.tolist(), strict=True)) != counts["tokens_per_source"]:
        raise damaged(path / TEST_SOURCES, "does not have as many tokens of each source as counted")


def _verify_rejected(path: Path, manifest: dict[str, Any]) -> None:
    """Checks the file of rejected documents, if there should be one."""
    if not manifest["options"]["keep_rejected"]:
        return
    entry, file = manifest["rejected_file"], path / REJECTED_FILE
    _verify_file(file, entry["sha256"], entry["bytes"])
    with file.open("rb") as lines:
        num_lines = sum(1 for _ in lines)
    for number in (entry["lines"], sum(manifest["rejected"].values())):
        if number != num_lines:
            what = f"says that {number} documents were rejected; {file} has {num_lines}"
            raise damaged(path / MANIFEST_FILE, what)


def _verify_file(file: Path, sha256: str, num_bytes: int | None = None) -> None:
    """Checks the sha256 of a file, and before that its size if that is known."""
    if not file.is_file():
        raise damaged(file, "is missing")
    if num_bytes not in (None, file.stat().st_size) or sha256_file(file) != sha256:
        raise damaged(file, "is damaged (its sha256 differs from the manifest's)")


def verify_shards(path: Path, manifest: dict[str, Any]) -> None:
    """Checks the size and the sha256 of every shard.

    Raises:
        UserError: a shard is missing or damaged; names it.
    """
    splits = manifest["splits"]
    shards = (splits["train"]["shards"], splits["test"]["shards"], source_shards(manifest))
    for shard in chain(*shards):
        _verify_file(path / shard["file"], shard["sha256"], shard["bytes"])
