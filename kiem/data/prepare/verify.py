"""Verification that a chunk directory is what its manifest says."""

from __future__ import annotations

import hashlib
import reprlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kiem.core.errors import UserError, damaged
from kiem.core.manifest import MANIFEST_FILE, verify_file
from kiem.data.chunks import (
    MAKE_AGAIN,
    NO_SOURCE,
    REJECTED_FILE,
    TEST_SOURCES,
    open_split,
    open_test_sources,
    read_manifest,
    read_tokenizer,
)
from kiem.data.documents import DOCUMENTS, open_verified_documents
from kiem.data.source_record import list_source_files


def verify_directory(path: Path) -> dict[str, Any]:
    """Checks every hash and count of a chunk directory and returns its manifest.

    Raises:
        UserError: it is no chunk directory, or something in it is missing or damaged; names it.
    """
    manifest = read_manifest(path)
    if "sha256" not in manifest:
        raise _wrong(path, "has no sha256 of itself")
    read_tokenizer(path, manifest)
    for name, sha256 in manifest["files"].items():
        verify_file(path / name, sha256, fix=MAKE_AGAIN)
    verify_shards(path, manifest)
    _verify_rejected(path, manifest)
    for split, counts in manifest["splits"].items():
        _verify_split(path, manifest, split)
        if counts.get("document_shards"):  # earlier versions did not record them
            _verify_documents(path, manifest, split)
    try:
        _verify_sums(path, manifest)
    except KeyError as error:  # earlier versions counted less
        raise _wrong(path, f"has no {error}") from error
    _verify_sources(path, manifest)
    return manifest


def verify_shards(path: Path, manifest: dict[str, Any]) -> None:
    """Checks the size and the sha256 of every shard.

    Raises:
        UserError: a shard is missing or damaged; names it.
    """
    for split in manifest["splits"].values():
        for shard in (*split["shards"], *split.get("source_shards", ())):
            verify_file(path / shard["file"], shard["sha256"], shard["bytes"], fix=MAKE_AGAIN)


def _wrong(path: Path, what: str) -> UserError:
    """Returns the error that the manifest is wrong."""
    return damaged(str(path / MANIFEST_FILE), what, MAKE_AGAIN)


def _verify_split(path: Path, manifest: dict[str, Any], split: str) -> None:
    """Checks the counts of a split against its chunks."""
    special, counts = manifest["special_ids"], manifest["splits"][split]
    found: Counter[str] = Counter()
    for _, block in open_split(path, manifest, split).read_all():
        found["chunks"] += len(block)
        found["documents"] += int(np.count_nonzero(block == special["bos"]))
        found["ends of documents"] += int(np.count_nonzero(block == special["eos"]))
        found["padding_tokens"] += int(np.count_nonzero(block == special["pad"]))
    num_tokens = found["chunks"] * manifest["options"]["chunk_size"]
    parts = counts.get("parts", ())
    if parts and sum(part["chunks"] for part in parts) != found["chunks"]:
        raise _wrong(path, "has parts that are not all chunks together")
    found["tokens"] = num_tokens - found["padding_tokens"]
    said = {**counts, "ends of documents": counts["documents"]}
    for name, number in found.items():
        if number != said[name]:
            what = f"says {said[name]} {name} in the {split} split; there are {number}"
            raise _wrong(path, what)


def _verify_documents(path: Path, manifest: dict[str, Any], split: str) -> None:
    """Checks the record of a split's documents: its hash, and that each begins with <bos>."""
    counts, bos = manifest["splits"][split], manifest["special_ids"]["bos"]
    documents = open_verified_documents(path, manifest, split)
    begins = (
        columns["position"][(columns["start"] == 0) & (columns["file"] != NO_SOURCE)]
        for columns in documents.columns
    )
    blocks = open_split(path, manifest, split).read_all()
    found = (first + np.flatnonzero(block == bos) for first, block in blocks)
    if _digest(begins) != _digest(found):
        what = f"does not have the {counts['documents']} documents of the {split} split"
        raise damaged(str(path / DOCUMENTS), what, MAKE_AGAIN)


def _digest(positions: Iterable[np.ndarray]) -> bytes:
    """Returns the SHA-256 of positions, of which there may be more than fit into memory."""
    digest = hashlib.sha256()
    for some in positions:
        digest.update(some.astype(np.int64).tobytes())
    return digest.digest()


def _verify_sums(path: Path, manifest: dict[str, Any]) -> None:
    """Checks the sums of a manifest: of what was read, nothing may be missing."""
    splits, limit = manifest["splits"], manifest["word_limit"] or {}
    num_read, num_beyond = manifest["documents_read"], manifest["documents_beyond_limit"]
    num_rejected = sum(manifest["rejected"].values())
    # A document that is cut was read once, and is in each split.
    num_kept = sum(counts["documents"] for counts in splits.values())
    num_kept -= manifest.get("cut_for_test", {}).get("documents", 0)
    per_file, rejected_per_file = manifest["documents_per_file"], manifest["rejected_per_file"]
    planned = list_source_files(manifest["source"])
    planned = planned[: len(planned) - limit.get("files_not_read", 0)]
    sums: list[tuple[str, Any, Any]] = [
        ("documents; what became of them", num_read, num_kept + num_rejected + num_beyond),
        ("documents; in all files", num_read, sum(per_file.values())),
        ("rejected; in all files", num_rejected, sum(rejected_per_file.values())),
        ("files planned; read", planned, list(per_file)),
        ("word limit reached; documents beyond", "reached_in" in limit, num_beyond > 0),
    ]
    if "reached_in" in limit:
        next_fits = limit["words_taken"] + limit["words_next"] <= limit["words"]
        is_beyond = limit["words_taken"] > limit["words"]
        sums.append(("words beyond the limit", False, next_fits or is_beyond))
    for split, counts in splits.items():
        for name in ("documents", "tokens", "bytes"):
            total = sum(counts[f"{name}_per_source"].values())
            sums.append((f"{name} in the {split} split; in all its sources", counts[name], total))
        for name in ("documents", "tokens"):
            if (in_files := counts.get(f"{name}_per_file")) is not None:  # of earlier versions
                total = sum(in_files.values())
                sums.append((f"{name} in the {split} split; in all files", counts[name], total))
    for what, said, found in sums:
        if said != found:
            values = f"{reprlib.repr(said)}; {reprlib.repr(found)}"
            raise _wrong(path, f"has counts that do not add up: {what} ({values})")


def _verify_sources(path: Path, manifest: dict[str, Any]) -> None:
    """Checks that the test tokens of every source are as many as the manifest says."""
    sources, counts = open_test_sources(path, manifest), manifest["splits"]["test"]
    if sources is None:
        return
    names = counts["source_names"]
    found = np.zeros(len(names), dtype=np.int64)
    for _, block in sources.read_all():
        found += np.bincount(block[block != NO_SOURCE], minlength=len(names))
    if dict(zip(names, found.tolist(), strict=True)) != counts["tokens_per_source"]:
        what = "does not have as many tokens of each source as counted"
        raise damaged(str(path / TEST_SOURCES), what, MAKE_AGAIN)


def _verify_rejected(path: Path, manifest: dict[str, Any]) -> None:
    """Checks the file of rejected documents, if there should be one."""
    if not manifest["options"]["keep_rejected"]:
        return
    entry, file = manifest["rejected_file"], path / REJECTED_FILE
    verify_file(file, entry["sha256"], entry["bytes"], fix=MAKE_AGAIN)
    with file.open("rb") as lines:
        num_lines = sum(1 for _ in lines)
    if not num_lines == entry["lines"] == sum(manifest["rejected"].values()):
        raise _wrong(path, f"does not have as many rejected documents as {file}: {num_lines}")
