"""Both splits of a chunk directory: chunks, where their documents are from, and counts.

Sources with weights have chunks of their own, so that training can draw from them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError, bad_option, no_effect
from kiem.data.arrow import to_numpy
from kiem.data.chunks import NO_SOURCE, TEST_SOURCES, SplitWriter
from kiem.data.documents import DOCUMENTS, DocumentWriter, make_pieces
from kiem.data.prepare.decisions import DocumentDecisions
from kiem.data.prepare.packing import make_packer
from kiem.data.prepare.split import TEST, TRAIN
from kiem.data.prepare.units import Job
from kiem.data.source_record import list_source_files, list_sources
from kiem.tokenizer.tokenizer import Tokenizer


class UnitDocuments(NamedTuple):
    """The documents of a unit.

    Attributes:
        batches: record batches of a unit file.
        names: what their `source` column numbers.
        codes: the decisions about all their rows.
        rows: int64 [rows], the line or row of each in its file.
    """

    batches: list[pa.RecordBatch]
    names: list[str]
    codes: np.ndarray
    rows: np.ndarray


class _SplitPacker:
    """Packs the documents of one split into shards, and counts them by source.

    Args:
        folder: of the shards, in the unfinished chunk directory.
        options: with the size of chunks and the way of packing.
        pad_id: what fills up chunks.
        open_files: closes what is open when work ends with an error.
        documents: where the pieces of documents are written; None: nowhere.
        column: name of the shards' column.
    """

    def __init__(
        self,
        folder: Path,
        options: PreprocessOptions,
        pad_id: int,
        open_files: ExitStack,
        documents: Path | None = None,
        column: str = "input_ids",
    ):
        self._chunk_size = options.chunk_size
        self._packer = make_packer(options.packing, options.chunk_size, pad_id)
        self._writer = SplitWriter(folder, options.chunk_size, open_files, column)
        self._documents = DocumentWriter(documents, open_files) if documents else None
        self._counts = {n: Counter[str]() for n in ("documents", "words", "bytes", "tokens")}
        self._numbers: dict[str, int] = {}
        self._per_file = {n: Counter[int]() for n in ("documents", "tokens")}
        self._num_chunks = 0

    def number(self, sources: np.ndarray, names: list[str]) -> np.ndarray:
        """Returns the numbers that sources have in this split, from their places in `names`."""
        numbers = np.zeros(len(names), np.int32)
        for place in np.unique(sources).tolist():
            numbers[place] = self._numbers.setdefault(names[place], len(self._numbers))
        return numbers[sources]

    def add(self, ids: np.ndarray, counted: dict[str, np.ndarray], names: list[str]) -> None:
        """Takes the ids of documents, what is counted of each, and the names of their sources."""
        source = self.number(counted["source"], names)
        places = {"file": counted["file"], "row": counted["row"], "source": source}
        documents = make_pieces(position=np.zeros(len(source)), start=0, **places)
        self._packer.add(ids, counted["tokens"], documents)
        self._write(self._packer.full_chunks())
        for name, counts in self._counts.items():
            sums = np.bincount(counted["source"], counted[name], len(names))
            counts.update(dict(zip(names, sums.astype(int).tolist(), strict=True)))
        first = int(counted["file"].min())
        for name, per_file in self._per_file.items():
            sums = np.bincount(counted["file"] - first, counted[name]).astype(int)
            per_file.update(dict(enumerate(sums.tolist(), start=first)))

    def end_part(self) -> int:
        """Writes what still waits, so that the next document begins a chunk; returns their number.

        That is the number of chunks so far.
        """
        self._write(self._packer.last_chunks())
        return self._num_chunks

    def close(self, file_names: Sequence[str]) -> dict[str, Any]:
        """Writes what still waits and returns the manifest's entry of the split."""
        self.end_part()
        shards = self._writer.close()
        totals = {name: counts.total() for name, counts in self._counts.items()}
        num_chunks = sum(shard["chunks"] for shard in shards)
        num_padding = num_chunks * self._chunk_size - totals["tokens"]
        assert num_padding == self._packer.num_padding_tokens, "tokens were lost"
        per_source = {name: +self._counts[name] for name in ("documents", "tokens", "bytes")}
        return {
            **totals,
            "chunks": num_chunks,
            "padding_tokens": num_padding,
            **{f"{n}_per_source": dict(sorted(c.items())) for n, c in per_source.items()},
            **{
                f"{name}_per_file": {
                    file_names[n]: count for n, count in sorted(counts.items()) if count
                }
                for name, counts in self._per_file.items()
            },
            "source_names": list(self._numbers),
            "shards": shards,
            **({"document_shards": [self._documents.close()]} if self._documents else {}),
        }

    def _write(self, chunks: np.ndarray) -> None:
        self._writer.write(chunks)
        self._num_chunks += len(chunks)
        pieces = self._packer.take_pieces()
        if self._documents is not None:
            self._documents.write(pieces)


def write_splits(
    documents: Iterable[UnitDocuments],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    folder: Path,
    open_files: ExitStack,
    file_names: Sequence[str],
    borders: Sequence[int] = (),
) -> tuple[dict[str, dict[str, Any]], int, list[int]]:
    """Packs the documents into chunks and writes both splits.

    Args:
        documents: of all units; those that are TRAIN or TEST are written.
        tokenizer: the one that made the ids.
        options: with the size of chunks and the way of packing.
        folder: the unfinished chunk directory.
        open_files: closes what is open when work ends with an error.
        file_names: of the source's files, in order.
        borders: numbers of files at which a chunk for training begins.

    Returns:
        The manifest's entry of each split; how many rows of the vocabulary no token has; and how
        many chunks for training there are before, between and after the borders.
    """
    splits = {}
    for name, code in (("train", TRAIN), ("test", TEST)):
        pieces = folder / DOCUMENTS / f"{name}.arrow"
        splits[code] = _SplitPacker(folder / name, options, tokenizer.pad_id, open_files, pieces)
    # Packed as the test tokens are: for each token, the number of its document's source.
    sources = _SplitPacker(folder / TEST_SOURCES, options, NO_SOURCE, open_files, column="source")
    is_used = np.zeros(tokenizer.num_rows, dtype=bool)
    ends: list[int] = []
    for unit in documents:
        start = 0
        for batch in unit.batches:
            here = slice(start, start + batch.num_rows)
            start += batch.num_rows
            part = np.searchsorted(borders, to_numpy(batch.column("file")), side="right")
            for (code, split), number in product(splits.items(), np.unique(part)):
                chosen = (unit.codes[here] == code) & (part == number)
                if not chosen.any():
                    continue
                while code == TRAIN and len(ends) < number:
                    ends.append(split.end_part())
                ids, counted = _chosen(batch, chosen)
                counted["row"] = unit.rows[here][chosen]
                is_used[ids] = True
                split.add(ids, counted, unit.names)
                if code == TEST:
                    of_rows = split.number(counted["source"], unit.names)
                    sources.add(np.repeat(of_rows, counted["tokens"]), counted, unit.names)
    train, test = (splits[code].close(file_names) for code in (TRAIN, TEST))
    test["source_shards"] = sources.close(file_names)["shards"]
    ends += [train["chunks"]] * (len(borders) + 1 - len(ends))
    num_chunks = np.diff(ends, prepend=0).tolist()
    return {"train": train, "test": test}, int(tokenizer.num_rows - is_used.sum()), num_chunks


def _chosen(batch: pa.RecordBatch, chosen: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the ids of the chosen rows, one after the other, and what is known of each."""
    column = batch.column("ids")
    lengths, ids = np.diff(to_numpy(column.offsets)), to_numpy(column.values)
    if not chosen.all():
        ids = ids[np.repeat(chosen, lengths)]
    names = ("source", "words", "bytes", "file")
    counted = {name: to_numpy(batch.column(name))[chosen] for name in names}
    tokens = lengths[chosen]
    return ids, {**counted, "tokens": tokens, "documents": np.ones_like(tokens)}


def check_weights(options: PreprocessOptions) -> None:
    """Raises a UserError if there is not a weight for each source."""
    if options.weights and len(options.source) == 1:
        raise no_effect("--weights", "with one source")
    if options.weights and len(options.weights) != len(options.source):
        what = f"{len(options.weights)} weights for {len(options.source)} sources"
        raise bad_option("--weights", what, "Give one for each --source, in the same order.")


def find_borders(job: Job, decisions: DocumentDecisions) -> list[int]:
    """Returns the numbers of the files at which a source with another weight begins.

    Raises:
        UserError: a document is cut for testing; what is left of it comes behind all sources.
    """
    if not job.options.weights:
        return []
    if decisions.num_cut:
        raise UserError(
            "the documents are so few and large that one of them is cut for testing",
            where="--weights",
            fix="Make a chunk directory of each source, and give the weights to training.py.",
            exit_code=ExitCode.DATASET_TOO_SMALL,
        )
    num_files = [len(list_source_files(entry)) for entry in list_sources(job.source.description)]
    assert len(num_files) == len(job.options.weights)
    borders: list[int] = np.cumsum(num_files)[:-1].tolist()
    return borders


def describe_parts(
    options: PreprocessOptions, borders: list[int], num_chunks: list[int], num_files: int
) -> list[dict[str, Any]]:
    """Returns the manifest's entry about sources with weights.

    Args:
        options: with the sources and their weights.
        borders: of `find_borders`.
        num_chunks: chunks of each source.
        num_files: of all.

    Raises:
        UserError: a source has no chunks.
    """
    files = np.diff([0, *borders, num_files]).tolist()
    columns = (options.source, num_chunks, files, options.weights)
    parts = [
        {"source": source, "chunks": chunks, "files": num, "weight": weight}
        for source, chunks, num, weight in zip(*columns, strict=True)
    ]
    for part in parts:
        if part["chunks"] == 0:
            raise UserError(
                f"{part['source']} has no text for training",
                where="--weights",
                fix="Leave it out, give more of it, or see what --keep-rejected keeps.",
                exit_code=ExitCode.DATASET_TOO_SMALL,
            )
    return parts
