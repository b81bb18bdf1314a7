"""The chunk directories that a run reads, as one: their chunks are numbered one after the other.

First those of --dataset-path, then those of --anneal. All have one tokenizer and size of chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError, bad_input, bad_option
from kiem.core.files import sha256_file
from kiem.core.manifest import MANIFEST_FILE
from kiem.core.values import option_flag
from kiem.data.chunks import (
    NO_SOURCE,
    Chunks,
    join_chunks,
    open_split,
    open_test_sources,
    read_manifest,
    read_tokenizer,
)
from kiem.data.order import PERIOD, ChunkOrder, Part, Stage, count_reads, whole_shares
from kiem.data.source_record import list_sources
from kiem.tokenizer.tokenizer import Tokenizer

# So many passes over the same text teach nearly as much as other text (arXiv:2305.16264).
MOST_EPOCHS = 4


@dataclass(frozen=True)
class Directory:
    """A chunk directory; `sha256` is that of its manifest."""

    path: Path
    manifest: dict[str, Any]
    sha256: str

    @property
    def name(self) -> str:
        """What it is called in messages and records."""
        return self.path.resolve().name

    @property
    def num_chunks(self) -> int:
        """Chunks for training."""
        return int(self.manifest["splits"]["train"]["chunks"])

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it has weights for, not yet numbered: itself, or its sources if they have some."""
        recorded = self.manifest["splits"]["train"].get("parts")
        if not recorded:
            return (Part(self.name, 0, self.num_chunks, 1.0),)
        return tuple(Part(each["source"], 0, each["chunks"], each["weight"]) for each in recorded)


@dataclass(frozen=True)
class Mixture:
    """The chunk directories of a run.

    Attributes:
        directories: of --dataset-path.
        anneal: of --anneal.
        parts, anneal_parts: what is drawn from both.
        tokenizer: that of all.
    """

    directories: tuple[Directory, ...]
    anneal: tuple[Directory, ...]
    parts: tuple[Part, ...]
    anneal_parts: tuple[Part, ...]
    tokenizer: Tokenizer

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the manifests of --dataset-path say together: the only one, or sums of counts."""
        return _joined([directory.manifest for directory in self.directories])

    @property
    def num_chunks(self) -> int:
        """Chunks for training in --dataset-path, of which an epoch reads each once."""
        return _num_chunks(self.directories)

    def identity(self) -> dict[str, Any]:
        """Returns what must be the same when a run is resumed; None is what a run may not have."""
        hashes, anneal = (
            [directory.sha256 for directory in directories] or None
            for directories in (self.directories, self.anneal)
        )
        shares, anneal_shares = (
            whole_shares(tuple(part.weight for part in parts)).tolist() if len(parts) > 1 else None
            for parts in (self.parts, self.anneal_parts)
        )
        return {
            "data": hashes[0] if hashes and len(hashes) == 1 else hashes,
            "weights": shares,
            "anneal": anneal,
            "anneal_weights": anneal_shares,
        }

    def describe(self) -> dict[str, list[dict[str, Any]]]:
        """Returns what a run records of its directories, in the order of their chunks."""
        return {
            key: [
                {"name": each.name, "manifest_sha256": each.sha256, "train_chunks": each.num_chunks}
                for each in directories
            ]
            for key, directories in (("directories", self.directories), ("anneal", self.anneal))
        }

    def order(
        self,
        options: TrainingOptions,
        chunks_per_step: int,
        max_steps: int | None,
        batch_warmup_steps: int = 0,
    ) -> ChunkOrder:
        """Returns the order in which a run reads the chunks.

        Args:
            options: all options of training.py.
            chunks_per_step: chunks in an update after the batch's warm-up.
            max_steps: updates of the run; --anneal has an effect only if it is known.
            batch_warmup_steps: updates of the batch's warm-up.
        """
        stages = [Stage(0, self.parts)]
        if self.anneal_parts and max_steps is not None:
            num_last = max(1, round(max_steps * options.anneal_share))
            stages.append(Stage(max_steps - num_last, self.anneal_parts))
        return ChunkOrder(tuple(stages), chunks_per_step, options.seed, batch_warmup_steps)

    def train_chunks(self) -> Chunks:
        """Maps the chunks for training, those of --anneal behind the others."""
        everything = (*self.directories, *self.anneal)
        return join_chunks([open_split(d.path, d.manifest, "train") for d in everything])

    def test_chunks(self) -> Chunks:
        """Maps the test chunks of --dataset-path, so that --anneal does not change the measure."""
        return join_chunks([open_split(d.path, d.manifest, "test") for d in self.directories])

    def test_sources(self) -> Chunks | None:
        """Maps the source of each test token: its place in the `source_names` of `manifest`.

        None if a directory does not have them.
        """
        found = []
        for directory in self.directories:
            chunks = open_test_sources(directory.path, directory.manifest)
            if chunks is None:
                return None
            if len(self.directories) > 1:
                names = self.manifest["splits"]["test"]["source_names"]
                own = directory.manifest["splits"]["test"]["source_names"]
                # NO_SOURCE stands for the last place.
                numbers = np.array([*map(names.index, own), NO_SOURCE], np.int32)
                chunks = replace(chunks, blocks=[numbers[block] for block in chunks.blocks])
            found.append(chunks)
        return join_chunks(found)


def read_mixture(options: TrainingOptions) -> Mixture:
    """Reads the manifests of the chunk directories of a run.

    Raises:
        UserError: one is missing or damaged, has another tokenizer or size of chunks than the
            first, or weights do not suit.
    """
    directories = _read(options.dataset_path, "--dataset-path")
    anneal = _read(options.anneal, "--anneal")
    first = directories[0]
    for other in (*directories[1:], *anneal):
        _check_same(first, other)
    return Mixture(
        directories,
        anneal,
        _parts(directories, options.weights, 0, "--weights"),
        _parts(anneal, options.anneal_weights, _num_chunks(directories), "--anneal-weights"),
        read_tokenizer(first.path, first.manifest),
    )


def _read(paths: Sequence[Path], option: str) -> tuple[Directory, ...]:
    if len({path.resolve() for path in paths}) < len(paths):
        raise bad_option(option, "a chunk directory is named twice", "Name each once.")
    return tuple(map(read_directory, paths))


def read_directory(path: Path) -> Directory:
    """Reads the manifest of a chunk directory; raises a UserError if it is missing or damaged."""
    manifest = read_manifest(path)
    sha256 = manifest.get("sha256") or sha256_file(path / MANIFEST_FILE)
    return Directory(path, manifest, sha256)


def _check_same(first: Directory, other: Directory) -> None:
    """Checks that the chunks of two directories can stand in one batch."""
    sizes = [each.manifest["options"]["chunk_size"] for each in (first, other)]
    if sizes[0] != sizes[1]:
        what = f"has chunks of {sizes[1]} tokens, but {first.path} of {sizes[0]}"
        fix = f"Make it again with preprocess.py --chunk-size {sizes[0]}."
        raise bad_input(str(other.path), what, fix)
    if first.manifest["tokenizer"]["sha256"] != other.manifest["tokenizer"]["sha256"]:
        raise UserError(
            f"was made with another tokenizer than {first.path}",
            where=str(other.path),
            fix=f"Make it again with preprocess.py --tokenizer {first.path}.",
            exit_code=ExitCode.TOKENIZER_MISMATCH,
        )


def _parts(
    directories: Sequence[Directory], weights: tuple[float, ...], first: int, option: str
) -> tuple[Part, ...]:
    """Returns what is drawn from: every directory by its weight, without weights all as one."""
    if not directories:
        return ()
    found = [directory.parts for directory in directories]
    if len(directories) == 1 < len(found[0]) and weights:
        # The weights of a directory's sources, in place of those that it was made with.
        found = [(part,) for part in found[0]]
    if weights and len(weights) != len(found):
        what = f"{len(weights)} weights for {len(found)} chunk directories"
        raise bad_option(option, what, "Give one for each, in the same order.")
    if not weights and all(len(parts) == 1 for parts in found):
        name = " + ".join(directory.name for directory in directories)
        return (Part(name, first, _num_chunks(directories), 1.0),)
    chosen = []
    for parts, weight in zip(found, weights or map(_size, found), strict=True):
        total = sum(part.weight for part in parts)
        for part in parts:
            chosen.append(replace(part, first=first, weight=weight * part.weight / total))
            first += part.num_chunks
    shares = tuple(part.weight for part in chosen)
    if 0 in whole_shares(shares):
        what = f"{min(shares) / sum(shares):.1g} of all is less than a {PERIOD:,}th"
        raise bad_option(option, what, "Give a larger weight, or leave the directory out.")
    return tuple(chosen)


def _size(parts: Sequence[Part]) -> int:
    return sum(part.num_chunks for part in parts)


def _num_chunks(directories: Sequence[Directory]) -> int:
    return sum(directory.num_chunks for directory in directories)


def _joined(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the manifest of several directories: what they have in common, and sums of counts."""
    first = manifests[0]
    if len(manifests) == 1:
        return first
    splits: dict[str, dict[str, Any]] = {}
    for name in first["splits"]:
        counts = [manifest["splits"][name] for manifest in manifests]
        splits[name] = {
            key: sum(each.get(key, 0) for each in counts)
            if isinstance(value, int)
            else dict(sum((Counter(each.get(key, {})) for each in counts), Counter()))
            for key, value in counts[0].items()
            if isinstance(value, int | dict)
        }
        names = [name for each in counts for name in each.get("source_names", ())]
        splits[name]["source_names"] = list(dict.fromkeys(names))
    return {
        "options": {
            key: value
            for key, value in first["options"].items()
            if all(manifest["options"].get(key) == value for manifest in manifests)
        },
        "source": {
            "kind": "several",
            "sources": [entry for each in manifests for entry in list_sources(each["source"])],
        },
        "tokenizer": first["tokenizer"],
        "special_ids": first["special_ids"],
        "splits": splits,
    }


def describe_reads(order: ChunkOrder, num_steps: int | None) -> str:
    """Returns how often a run reads each part, or its share if the length is not known."""
    described: list[str] = []
    for stage, counts in zip(order.stages, count_reads(order, num_steps or 0), strict=True):
        total = sum(part.weight for part in stage.parts)
        texts = [
            f"{part.name} {part.weight / total:.0%}"
            if num_steps is None
            else f"{part.name} {count / part.num_chunks:.2f} times"
            for part, count in zip(stage.parts, counts, strict=True)
        ]
        start = f"from update {stage.first_step + 1:,} on " if described else ""
        described.append(start + ", ".join(texts))
    return "; ".join(described)


def warnings_of_splits(mixture: Mixture) -> Iterator[str]:
    """Yields which directory may have for training what another one has for testing."""
    first, *others = (*mixture.directories, *mixture.anneal)
    for other in others:
        for name in ("seed", "test_split"):
            values = [each.manifest["options"].get(name) for each in (first, other)]
            if values[0] != values[1]:
                yield (
                    f"{other.name} has {option_flag(name)} {values[1]}, but {first.name} "
                    f"{values[0]}: a document of both may be trained on and tested on"
                )


def warnings_of_epochs(order: ChunkOrder, num_steps: int) -> Iterator[str]:
    """Yields what a run reads too often."""
    for stage, counts in zip(order.stages, count_reads(order, num_steps), strict=True):
        for part, count in zip(stage.parts, counts, strict=True):
            if count > MOST_EPOCHS * part.num_chunks:
                yield (
                    f"{part.name} is read {count / part.num_chunks:.1f} times; more than "
                    f"{MOST_EPOCHS} times teaches less than other text (arXiv:2305.16264)"
                )
