"""From finished units to the two splits: chunks on the disk, and counts of all that is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from kiem.data.arrow import to_numpy
from kiem.data.chunks import NO_SOURCE, TEST_SOURCES, SplitWriter
from kiem.data.prepare.fates import TEST, TRAIN
from kiem.data.prepare.packing import make_packer
from kiem.data.prepare.unit_files import open_unit
from kiem.tokenizer.tokenizer import Tokenizer

SPLITS = {"train": TRAIN, "test": TEST}


@dataclass
class SplitCounts:
    """What went into one split."""

    documents: int = 0
    words: int = 0
    bytes: int = 0
    tokens: int = 0
    chunks: int = 0
    padding_tokens: int = 0
    documents_per_source: Counter[str] = field(default_factory=Counter)
    tokens_per_source: Counter[str] = field(default_factory=Counter)
    bytes_per_source: Counter[str] = field(default_factory=Counter)


def write_splits(
    parts: Sequence[tuple[Path, np.ndarray]],
    tokenizer: Tokenizer,
    chunk_size: int,
    packing: Literal["concat", "best-fit"],
    folder: Path,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Packs the documents into chunks and writes both splits.

    Args:
        parts: unit files, each with what becomes of its rows, int8 [rows]: those that are TRAIN or
            TEST are written.
        tokenizer: whose padding fills the ends.
        chunk_size: tokens in a chunk.
        packing: how documents become chunks.
        folder: the unfinished chunk directory.

    Returns:
        The manifest's entry of each split, and how many rows of the vocabulary no token has.
    """
    writers = {split: SplitWriter(folder / split, chunk_size) for split in SPLITS}
    packers = {split: make_packer(packing, chunk_size, tokenizer.pad_id) for split in SPLITS}
    counts = {split: SplitCounts() for split in SPLITS}
    # Packed as the test tokens are: beside each token, which source its document is from.
    source_writer = SplitWriter(folder / TEST_SOURCES, chunk_size, column="source")
    source_packer = make_packer(packing, chunk_size, NO_SOURCE)
    source_numbers: dict[str, int] = {}
    used = np.zeros(tokenizer.num_rows, dtype=bool)
    for path, fate in parts:
        batches, summary = open_unit(path)
        start = 0
        for batch in batches:
            here = fate[start : start + batch.num_rows]
            start += batch.num_rows
            for split, code in SPLITS.items():
                is_here = here == code
                if not is_here.any():
                    continue
                ids, lengths = _documents(batch, is_here)
                used[ids] = True
                packers[split].add(ids, lengths)
                writers[split].write(packers[split].full_chunks())
                _count(counts[split], batch, is_here, summary.sources)
                if split == "test":
                    labels = to_numpy(batch.column("source"))[is_here]
                    numbers = _source_numbers(labels, summary.sources, source_numbers)
                    source_packer.add(np.repeat(numbers, lengths), lengths)
                    source_writer.write(source_packer.full_chunks())
    entries = {}
    for split in SPLITS:
        writers[split].write(packers[split].last_chunks())
        shards = writers[split].close()
        count = counts[split]
        count.chunks = sum(shard["chunks"] for shard in shards)
        count.padding_tokens = count.chunks * chunk_size - count.tokens
        assert count.padding_tokens == packers[split].num_padding_tokens, "tokens were lost"
        entries[split] = {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for name, value in vars(count).items()
        }
        entries[split]["shards"] = shards
    source_writer.write(source_packer.last_chunks())
    entries["test"]["source_names"] = list(source_numbers)
    entries["test"]["source_shards"] = source_writer.close()
    return entries, int(tokenizer.num_rows - used.sum())


def _documents(batch: pa.RecordBatch, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of the chosen rows, one after the other, and the length of each."""
    column = batch.column("ids")
    lengths = np.diff(to_numpy(column.offsets))
    ids = to_numpy(column.values)
    if chosen.all():
        return ids, lengths
    return ids[np.repeat(chosen, lengths)], lengths[chosen]


def _source_numbers(labels: np.ndarray, sources: list[str], numbers: dict[str, int]) -> np.ndarray:
    """Returns the number of each document's source, int32 [documents]; new ones get the next.

    Args:
        labels: places in `sources`, int [documents].
        sources: of the unit.
        numbers: of the sources so far; grows.
    """
    found = np.unique(labels)
    here = np.zeros(len(sources), dtype=np.int32)
    here[found] = [numbers.setdefault(sources[label], len(numbers)) for label in found]
    return here[labels]


def _count(
    counts: SplitCounts, batch: pa.RecordBatch, chosen: np.ndarray, sources: list[str]
) -> None:
    num_bytes = to_numpy(batch.column("bytes"))[chosen]
    labels = to_numpy(batch.column("source"))[chosen]
    counts.documents += int(chosen.sum())
    counts.words += int(to_numpy(batch.column("words"))[chosen].sum())
    counts.bytes += int(num_bytes.sum())
    num_tokens = np.diff(to_numpy(batch.column("ids").offsets))[chosen]
    counts.tokens += int(num_tokens.sum())
    for label in np.unique(labels):
        name, is_from = sources[label], labels == label
        counts.documents_per_source[name] += int(is_from.sum())
        counts.tokens_per_source[name] += int(num_tokens[is_from].sum())
        counts.bytes_per_source[name] += int(num_bytes[is_from].sum())
