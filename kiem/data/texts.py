"""The texts that a run read, with their licences and shares, for its summary and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kiem.data.mixture import Mixture
from kiem.data.order import ChunkOrder, count_reads
from kiem.data.source_record import describe_source, list_source_files, list_sources


def list_texts(mixture: Mixture, order: ChunkOrder, num_steps: int) -> list[dict[str, Any]]:
    """Returns for each source of each chunk directory what a run read of it.

    Args:
        mixture: the chunk directories.
        order: which chunks each update reads.
        num_steps: updates of the run.

    Returns:
        `directory` and `text` say what it is; `licence` is None if none is stated; `documents` and
        `tokens` are those for training in the directory; `share` is that of all tokens read.
    """
    directories = (*mixture.directories, *mixture.anneal)
    sizes = np.array([directory.num_chunks for directory in directories])
    firsts = np.cumsum(sizes) - sizes
    reads = np.zeros(len(directories))
    for stage, counts in zip(order.stages, count_reads(order, num_steps), strict=True):
        for part, count in zip(stage.parts, counts, strict=True):
            is_here = (part.first <= firsts) & (firsts < part.first + part.num_chunks)
            reads += is_here * count * sizes / part.num_chunks
    texts = []
    for directory, share in zip(directories, reads / max(1, reads.sum()), strict=True):
        train, entries = (
            directory.manifest["splits"]["train"],
            list_sources(directory.manifest["source"]),
        )
        for entry in entries:
            documents, tokens = (_count(train, name, entry) for name in ("documents", "tokens"))
            texts.append(
                {
                    "directory": directory.name,
                    "text": _name(entry),
                    "licence": entry.get("licence"),
                    "documents": documents,
                    "tokens": tokens,
                    "share": float(share * tokens / max(1, train["tokens"])),
                }
            )
    return texts


def _name(entry: dict[str, Any]) -> str:
    if entry["kind"] != "files":
        return describe_source(entry)
    files = list_source_files(entry)
    name = Path(files[0]).name
    return f"{len(files):,} local files, such as {name}" if len(files) > 1 else f"local file {name}"


def _count(train: dict[str, Any], name: str, entry: dict[str, Any]) -> int:
    """Returns how many documents or tokens of the training split are of a source."""
    per_file: dict[str, int] | None = train.get(f"{name}_per_file")
    if per_file is None:  # earlier versions had one source for each directory
        return int(train[name])
    return sum(per_file.get(file, 0) for file in list_source_files(entry))
