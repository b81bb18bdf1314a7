"""The chunk directory: Arrow shards and a manifest that says what is in them.

train/data-00000-of-00002.arrow ...   int32 `input_ids` of a fixed size, memory-mapped
test/...                              (both open with datasets.load_from_disk)
test_sources/...                      beside each test token, which source its document is from
manifest.json                         options, source, counts, sha256 of every file and of itself
tokenizer.json ...                    the tokenizer the ids belong to
rejected.jsonl                        the rejected documents, with --keep-rejected
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import sha256_file, to_json, write_json
from kiem.core.json_input import convert, parse_json
from kiem.core.leftovers import recover_folder
from kiem.data.arrow import from_numpy, to_numpy
from kiem.data.manifest_shape import Manifest, Version
from kiem.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, parse_tokenizer

SCHEMA_VERSION = 1
DATASET_DICT_FILE = "dataset_dict.json"
MANIFEST_FILE = "manifest.json"
REJECTED_FILE = "rejected.jsonl"
TEST_SOURCES = "test_sources"
NO_SOURCE = -1  # of padding
_SHARD_TOKENS = 1 << 26
_BATCH_ROWS = 1000
_FIX = "Make the chunk directory again with preprocess.py --overwrite."


class SplitWriter:
    """Writes the chunks of one split as Arrow shards that `datasets` can open.

    Args:
        folder: the split's folder inside the unfinished chunk directory.
        chunk_size: tokens in a chunk.
        column: what the numbers in a chunk are.
    """

    def __init__(self, folder: Path, chunk_size: int, column: str = "input_ids"):
        folder.mkdir()
        self._folder = folder
        self._schema = pa.schema([(column, pa.list_(pa.int32(), chunk_size))])
        self._chunk_size = chunk_size
        self._shard_rows = max(1, _SHARD_TOKENS // chunk_size)
        self._rows: list[int] = []
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def write(self, chunks: np.ndarray) -> None:
        """Appends int32 chunks [num_chunks, chunk_size]."""
        # Batches of one size, so that the shards do not depend on how the chunks arrived.
        self._waiting.append(chunks)
        self._num_waiting += len(chunks)
        if self._num_waiting >= _BATCH_ROWS:
            waiting = np.concatenate(self._waiting)
            cut = len(waiting) - len(waiting) % _BATCH_ROWS
            for start in range(0, cut, _BATCH_ROWS):
                self._write_batch(waiting[start : start + _BATCH_ROWS])
            self._waiting, self._num_waiting = [waiting[cut:]], len(waiting) - cut

    def _write_batch(self, chunks: np.ndarray) -> None:
        """Writes chunks as record batches, one or two where a shard ends between them."""
        start = 0
        while start < len(chunks):
            if self._writer is None or self._rows[-1] == self._shard_rows:
                self._next_shard()
            assert self._writer is not None
            num_rows = min(len(chunks) - start, self._shard_rows - self._rows[-1])
            rows = np.ascontiguousarray(chunks[start : start + num_rows], dtype=np.int32)
            column = pa.FixedSizeListArray.from_arrays(
                from_numpy(rows.reshape(-1)), type=self._schema.field(0).type
            )
            self._writer.write_batch(pa.record_batch([column], schema=self._schema))
            self._rows[-1] += num_rows
            start += num_rows

    def close(self) -> list[dict[str, Any]]:
        """Finishes the split and returns the manifest's entry of every shard."""
        if self._num_waiting:
            self._write_batch(np.concatenate(self._waiting))
        if self._writer is None:
            self._next_shard()
        assert self._writer is not None
        self._writer.close()
        shards = []
        for index, rows in enumerate(self._rows):
            name = f"data-{index:05d}-of-{len(self._rows):05d}.arrow"
            path = self._unfinished(index).rename(self._folder / name)
            shards.append(
                {
                    "file": f"{self._folder.name}/{name}",
                    "chunks": rows,
                    "bytes": path.stat().st_size,
                    "sha256": sha256_file(path),
                }
            )
        _write_datasets_files(self._folder, shards, self._schema.field(0))
        return shards

    def _next_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        path = self._unfinished(len(self._rows))
        self._writer = pa.ipc.new_stream(str(path), self._schema)
        self._rows.append(0)

    def _unfinished(self, index: int) -> Path:
        return self._folder / f"{index:05d}.unfinished"


def finish_directory(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes what makes the shards a chunk directory: the manifest and the DatasetDict file."""
    write_json(folder / DATASET_DICT_FILE, {"splits": ["train", "test"]})
    # The small files; the others have their sha256 beside their counts.
    paths = [path for path in sorted(folder.rglob("*.json")) if path.name != TOKENIZER_FILE]
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    manifest = {"schema_version": SCHEMA_VERSION, **manifest, "files": files}
    write_json(folder / MANIFEST_FILE, {**manifest, "sha256": _sha256_of(manifest)})


def _sha256_of(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest as compact JSON, but for its own `sha256`."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a chunk directory.

    Raises:
        UserError: the folder is missing, is not a chunk directory of this version, or its manifest
            is damaged.
    """
    if not recover_folder(path).is_dir():
        raise UserError(
            "no such chunk directory",
            where=str(path),
            fix="Make it with preprocess.py, or correct --dataset-path.",
            exit_code=ExitCode.NOT_FOUND,
        )
    try:
        written = (path / MANIFEST_FILE).read_bytes()
        manifest = parse_json(written)
        version = msgspec.convert(manifest, Version).schema_version
    except (OSError, ValueError) as error:
        raise UserError(
            f"not a chunk directory: no readable {MANIFEST_FILE}",
            where=str(path),
            fix="Name a folder that preprocess.py made, such as processed_data/chunked_10k.",
            exit_code=ExitCode.BAD_INPUT,
        ) from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"chunk directory of schema version {version}; this kiem reads {SCHEMA_VERSION}",
            where=str(path / MANIFEST_FILE),
            fix="Make it again with preprocess.py --overwrite.",
            exit_code=ExitCode.BAD_INPUT,
        )
    is_whole = (
        manifest.get("sha256") == _sha256_of(manifest) and written == to_json(manifest).encode()
    )
    if "sha256" in manifest and not is_whole:
        raise damaged(path / MANIFEST_FILE, "is damaged (its content has another sha256)")
    where = str(path / MANIFEST_FILE)
    convert(manifest, Manifest, where=where, fix=_FIX, exit_code=ExitCode.DAMAGED)
    return dict(manifest)


def read_tokenizer(path: Path, manifest: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer kept in a chunk directory, checked against its manifest.

    Raises:
        UserError: it is missing or not the one that made the chunks.
    """
    file = path / TOKENIZER_FILE
    try:
        json_bytes = file.read_bytes()
    except OSError as error:
        raise damaged(file, f"cannot be read ({error.strerror})") from error
    tokenizer = parse_tokenizer(json_bytes, str(file))
    if tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
        raise UserError(
            "this is not the tokenizer that made the chunks (its sha256 differs)",
            where=str(file),
            fix="Put the original back, or make the chunk directory again with preprocess.py.",
            exit_code=ExitCode.TOKENIZER_MISMATCH,
        )
    return tokenizer


@dataclass(frozen=True)
class Chunks:
    """The chunks of one split, memory-mapped.

    Attributes:
        blocks: views into the mapped shards, each int32 [rows, chunk_size].
        first_rows: number of the first chunk of each block.
        num_chunks: chunks in the split.
        chunk_size: tokens in a chunk.
        mappings: the mapped shards.
    """

    blocks: list[np.ndarray]
    first_rows: np.ndarray
    num_chunks: int
    chunk_size: int
    mappings: Sequence[mmap.mmap] = ()

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Returns chunks by number as an int32 copy [len(numbers), chunk_size]."""
        which = np.searchsorted(self.first_rows, numbers, side="right") - 1
        rows = [
            self.blocks[block][number - self.first_rows[block]]
            for block, number in zip(which, numbers, strict=True)
        ]
        copy = np.stack(rows)
        # The system keeps what was read in its own cache. Mapped as well, it would count as memory
        # of this program, which in a long training would seem to grow by the size of the data.
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED)
        return copy


def open_split(path: Path, manifest: dict[str, Any], split: str) -> Chunks:
    """Maps the shards of a split into memory; nothing is copied."""
    return _open(path, manifest, manifest["splits"][split]["shards"])


def open_test_sources(path: Path, manifest: dict[str, Any]) -> Chunks | None:
    """Maps what `open_split` maps of the test split, with sources in the place of tokens.

    Returns:
        Places in the manifest's `source_names`, NO_SOURCE for padding; None if the chunk directory
        was made by a kiem that did not keep them.
    """
    shards = source_shards(manifest)
    return _open(path, manifest, shards) if shards else None


def source_shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the manifest's entry of every shard of test_sources/."""
    shards: list[dict[str, Any]] = manifest["splits"]["test"].get("source_shards", [])
    return shards


def _open(path: Path, manifest: dict[str, Any], shards: list[dict[str, Any]]) -> Chunks:
    chunk_size = manifest["options"]["chunk_size"]
    mappings = [_map_shard(path / shard["file"]) for shard in shards]
    blocks = []
    for shard, mapping in zip(shards, mappings, strict=True):
        try:
            table = pa.ipc.open_stream(pa.py_buffer(mapping)).read_all()
        except (pa.ArrowException, OSError) as error:
            raise damaged(path / shard["file"], f"cannot be read ({error})") from error
        if table.schema.types != [pa.list_(pa.int32(), chunk_size)]:
            what = f"has {table.schema.types}, not chunks of {chunk_size} tokens"
            raise damaged(path / shard["file"], what)
        if len(table) != shard["chunks"]:
            what = f"has {len(table)} chunks, not {shard['chunks']}"
            raise damaged(path / shard["file"], what)
        for batch in table.column(0).chunks:
            blocks.append(to_numpy(batch.flatten()).reshape(-1, chunk_size))
    rows = np.array([len(block) for block in blocks], dtype=np.int64)
    return Chunks(blocks, np.cumsum(rows) - rows, int(rows.sum()), chunk_size, mappings)


def _map_shard(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # the second for an empty file
        raise damaged(file, f"cannot be read ({error})") from error


def _write_datasets_files(folder: Path, shards: list[dict[str, Any]], column: pa.Field) -> None:
    # The files that datasets.Dataset.save_to_disk writes beside its shards. "Sequence" is the name
    # that datasets of all versions understand; 4.0 renamed it to "List".
    value = {"dtype": "int32", "_type": "Value"}
    feature = {"feature": value, "length": column.type.list_size, "_type": "Sequence"}
    info = {"citation": "", "description": "", "homepage": "", "license": ""}
    write_json(folder / "dataset_info.json", {**info, "features": {column.name: feature}})
    state = {
        "_data_files": [{"filename": Path(shard["file"]).name} for shard in shards],
        "_fingerprint": shards[0]["sha256"][:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    write_json(folder / "state.json", state)


def damaged(file: Path, what: str) -> UserError:
    """Returns the error that something in a chunk directory is damaged."""
    return UserError(
        what,
        where=str(file),
        fix=_FIX,
        exit_code=ExitCode.DAMAGED,
    )
