"""Checks that a chunk directory is what its manifest says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kiem.core.files import sha256_file
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
    for split in manifest["splits"]:
        _verify_split(path, manifest, split)
    for fault in _find_faults(manifest):
        raise damaged(path / MANIFEST_FILE, f"has counts that do not add up: {fault}")
    _verify_sources(path, manifest)
    return manifest


def _verify_split(path: Path, manifest: dict[str, Any], split: str) -> None:
    """Checks what is counted in a split against its chunks."""
    special, counts = manifest["special_ids"], manifest["splits"][split]
    found: Counter[str] = Counter()
    for block in open_split(path, manifest, split).blocks:
        found["chunks"] += len(block)
        found["documents"] += int(np.count_nonzero(block == special["bos"]))
        found["ends of documents"] += int(np.count_nonzero(block == special["eos"]))
        found["padding_tokens"] += int(np.count_nonzero(block == special["pad"]))
    num_places = found["chunks"] * manifest["options"]["chunk_size"]
    found["tokens"] = num_places - found["padding_tokens"]
    said = {**counts, "ends of documents": counts["documents"]}
    for name, number in found.items():
        if number != said[name]:
            what = f"says {said[name]} {name} in the {split} split; there are {number}"
            raise damaged(path / MANIFEST_FILE, what)


def _find_faults(manifest: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong about the sums of a manifest: of what was read, nothing may be missing.

    Chunk directories of earlier versions have fewer counts, which are left out here.
    """
    splits, rejected = manifest["splits"], sum(manifest["rejected"].values())
    num_read = manifest["documents_read"]
    # A document that is cut is one that was read, and one in each split.
    num_cut = manifest.get("cut_for_test", {}).get("documents", 0)
    num_kept = sum(counts["documents"] for counts in splits.values())
    num_beyond = manifest.get("documents_beyond_limit", 0)
    if num_read + num_cut != num_kept + rejected + num_beyond:
        yield (
            f"{num_read} documents read, {num_kept} kept, {num_cut} cut, {rejected} rejected, "
            f"{num_beyond} beyond the word limit"
        )
    for split, counts in splits.items():
        for name in ("documents", "tokens", "bytes"):
            per_source = counts.get(f"{name}_per_source")
            if per_source is not None and (number := sum(per_source.values())) != counts[name]:
                yield f"{counts[name]} {name} in the {split} split, {number} of all its sources"
    if "documents_per_file" not in manifest:
        return
    per_file, rejected_per_file = manifest["documents_per_file"], manifest["rejected_per_file"]
    if sum(per_file.values()) != num_read:
        yield f"{num_read} documents read, {sum(per_file.values())} in all files"
    if sum(rejected_per_file.values()) != rejected:
        yield f"{rejected} documents rejected, {sum(rejected_per_file.values())} in all files"
    source, limit = manifest["source"], manifest["word_limit"] or {}
    planned = list(source.get("files") or source["sha256"])
    planned = planned[: len(planned) - limit.get("files_not_read", 0)]
    if list(per_file) != planned:
        missing = [name for name in planned if name not in per_file]
        yield f"{len(planned)} files to be read, {len(per_file)} read{_some(missing)}"
    is_reached = "reached_in" in limit
    if is_reached != (num_beyond > 0):
        yield f"{num_beyond} documents beyond a word limit, reached in {limit.get('reached_in')}"
    if is_reached and not 0 <= limit["words"] - limit["words_taken"] < limit["words_next"]:
        yield (
            f"{limit['words_next']} more words than {limit['words_taken']} were too many, "
            f"{limit['words']} allowed"
        )


def _some(missing: list[str]) -> str:
    return f", not {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}" if missing else ""


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
