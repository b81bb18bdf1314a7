"""The texts that a run read, with their licences and shares, for its summary and the model card."""

from __future__ import annotations

from typing import Any

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
    texts, first = [], 0
    for directory in (*mixture.directories, *mixture.anneal):
        train, source = directory.manifest["splits"]["train"], directory.manifest["source"]
        # Sources with weights are read by themselves; of all others each token is read as often.
        names = list_source_files(source)
        shares: dict[str, float] = {}
        for part in train.get("parts") or [{"chunks": directory.num_chunks, "files": len(names)}]:
            files, names = names[: part["files"]], names[part["files"] :]
            tokens = {file: _count(train, "tokens", [file]) for file in files}
            share = _share(order, num_steps, first, part["chunks"]) / max(1, sum(tokens.values()))
            shares |= {file: share * tokens[file] for file in files}
            first += part["chunks"]
        for entry in list_sources(source):
            files = list_source_files(entry)
            texts.append(
                {
                    "directory": directory.name,
                    "text": describe_source(entry),
                    "licence": entry.get("licence"),
                    "documents": _count(train, "documents", files),
                    "tokens": _count(train, "tokens", files),
                    "share": sum(shares[file] for file in files),
                }
            )
    return texts


def _share(order: ChunkOrder, num_steps: int, first: int, num_chunks: int) -> float:
    """Returns the share of consecutive chunks in all that the first updates read."""
    reads = 0.0
    for stage, counts in zip(order.stages, count_reads(order, num_steps), strict=True):
        for part, count in zip(stage.parts, counts, strict=True):
            end = min(first + num_chunks, part.first + part.num_chunks)
            reads += count * max(0, end - max(first, part.first)) / part.num_chunks
    return reads / max(1, order.count_chunks(num_steps))


def _count(train: dict[str, Any], name: str, files: list[str]) -> int:
    """Returns how many documents or tokens of the training split are of some files."""
    per_file: dict[str, int] | None = train.get(f"{name}_per_file")
    if per_file is None:  # earlier versions had one source for each directory
        return int(train[name])
    return sum(per_file.get(file, 0) for file in files)
