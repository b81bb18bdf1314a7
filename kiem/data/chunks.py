"""The chunk directory: Arrow shards, and a manifest of what is in them.

train/data-00000-of-00002.arrow ...   int32 `input_ids` of a fixed size, memory-mapped
test/...                              (both open with datasets.load_from_disk)
test_sources/...                      for each test token, the source of its document
documents/train.arrow, test.arrow     which document every token is of, see documents.py
manifest.json                         options, source, counts, SHA-256 of every file and itself
tokenizer.json ...                    the tokenizer of the ids
rejected.jsonl                        the rejected documents, with --keep-rejected
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pyarrow as pa

from kiem.core.errors import ExitCode, UserError, bad_input, damaged, not_found
from kiem.core.files import sha256_file, write_json
from kiem.core.json_input import convert
from kiem.core.manifest import MANIFEST_FILE, FileName, read_content, write_content
from kiem.data.arrow import from_numpy, to_numpy
from kiem.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, parse_tokenizer

SCHEMA_VERSION = 1
DATASET_DICT_FILE = "dataset_dict.json"
REJECTED_FILE = "rejected.jsonl"
TEST_SOURCES = "test_sources"
NO_SOURCE = -1  # of padding
MAKE_AGAIN = "Make the chunk directory again with preprocess.py --overwrite."
_SHARD_TOKENS = 1 << 26
_BATCH_ROWS = 1000
_BLOCKS_MAPPED = 64

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Version(msgspec.Struct):
    schema_version: int


class _Shard(msgspec.Struct):
    file: FileName
    chunks: _Count
    bytes: _Count
    sha256: str


class _DocumentShard(msgspec.Struct):
    file: FileName
    pieces: _Count
    bytes: _Count
    sha256: str


class _Part(msgspec.Struct):
    source: str
    chunks: Annotated[int, msgspec.Meta(ge=1)]
    files: Annotated[int, msgspec.Meta(ge=1)]
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class _Split(msgspec.Struct):
    documents: _Count
    words: _Count
    bytes: _Count
    tokens: _Count
    chunks: _Count
    shards: Annotated[list[_Shard], msgspec.Meta(min_length=1)]
    bytes_per_source: dict[str, _Count]
    source_names: list[str] = []
    source_shards: list[_Shard] = []
    parts: list[_Part] = []
    document_shards: Annotated[list[_DocumentShard], msgspec.Meta(max_length=1)] = []


class ChunkOptions(msgspec.Struct):
    """The options of a chunk directory that training and evaluation rely on."""

    chunk_size: Annotated[int, msgspec.Meta(ge=2, lt=1 << 31)]


class _Tokenizer(msgspec.Struct):
    sha256: str


class _Manifest(msgspec.Struct):
    """What reading relies on; other keys are only shown or verified."""

    options: ChunkOptions
    splits: Annotated[dict[Literal["train", "test"], _Split], msgspec.Meta(min_length=2)]
    tokenizer: _Tokenizer
    special_ids: dict[str, _Count]
    documents_read: _Count
    rejected: dict[str, _Count]
    files: dict[FileName, str]


class SplitWriter:
    """Writes the chunks of one split as Arrow shards that `datasets` can open.

    Args:
        folder: the split's folder inside the unfinished chunk directory.
        chunk_size: tokens in a chunk.
        open_files: closes the shard that is open when work ends with an error.
        column: name of the column.
    """

    def __init__(self, folder: Path, chunk_size: int, open_files: ExitStack, column: str):
        folder.mkdir()
        self._folder, self._open_files = folder, open_files
        self._schema = pa.schema([(column, pa.list_(pa.int32(), chunk_size))])
        # Record batches of one size, so that the shards do not depend on how the chunks arrive.
        shard_rows = max(1, _SHARD_TOKENS // chunk_size)
        self._batch_rows = min(_BATCH_ROWS, shard_rows)
        self._shard_rows = shard_rows // self._batch_rows * self._batch_rows
        self._rows: list[int] = []  # of each shard
        self._shard: tuple[pa.RecordBatchStreamWriter, pa.OSFile] | None = None
        self._waiting = np.empty((0, chunk_size), np.int32)

    def write(self, chunks: np.ndarray) -> None:
        """Appends int32 chunks [num_chunks, chunk_size]."""
        self._waiting = np.concatenate([self._waiting, chunks])
        while len(self._waiting) >= self._batch_rows:
            self._write_batch(self._waiting[: self._batch_rows])
            self._waiting = self._waiting[self._batch_rows :]

    def close(self) -> list[dict[str, Any]]:
        """Finishes the split and returns the manifest's entry of every shard."""
        if len(self._waiting) or not self._rows:
            self._write_batch(self._waiting)
        self._close_shard()
        shards = []
        for index, rows in enumerate(self._rows):
            name = f"data-{index:05d}-of-{len(self._rows):05d}.arrow"
            path = self._unfinished(index).rename(self._folder / name)
            size = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            shards.append({"file": f"{self._folder.name}/{name}", "chunks": rows, **size})
        _write_datasets_files(self._folder, shards, self._schema.field(0))
        return shards

    def _write_batch(self, chunks: np.ndarray) -> None:
        if not self._rows or self._rows[-1] == self._shard_rows:
            self._close_shard()
            path = self._unfinished(len(self._rows))
            file = self._open_files.enter_context(pa.OSFile(str(path), "wb"))
            self._shard = pa.ipc.new_stream(file, self._schema), file
            self._rows.append(0)
        assert self._shard is not None
        column_type = self._schema.field(0).type
        column = pa.FixedSizeListArray.from_arrays(from_numpy(chunks.reshape(-1)), type=column_type)
        self._shard[0].write_batch(pa.record_batch([column], schema=self._schema))
        self._rows[-1] += len(chunks)

    def _close_shard(self) -> None:
        for opened in self._shard or ():
            opened.close()

    def _unfinished(self, index: int) -> Path:
        return self._folder / f"{index:05d}.unfinished"


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


def finish_directory(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes what makes the shards a chunk directory: the manifest and the DatasetDict file."""
    write_json(folder / DATASET_DICT_FILE, {"splits": ["train", "test"]})
    # The small files; the others have their sha256 beside their counts.
    paths = [path for path in sorted(folder.rglob("*.json")) if path.name != TOKENIZER_FILE]
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    write_content(folder, {"schema_version": SCHEMA_VERSION, **manifest, "files": files})


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a chunk directory.

    Raises:
        UserError: the folder is missing, is not a chunk directory of this version, or its manifest
            is damaged.
    """
    file = path / MANIFEST_FILE
    if not path.is_dir():
        fix = "Make it with preprocess.py, or correct --dataset-path."
        raise not_found(str(path), "no such chunk directory", fix)
    try:
        manifest, is_intact = read_content(path)
        version = msgspec.convert(manifest, _Version).schema_version
    except (OSError, ValueError) as error:
        what = f"not a chunk directory: no readable {MANIFEST_FILE}"
        fix = "Name a folder that preprocess.py made, such as processed_data/chunked_10k."
        raise bad_input(str(path), what, fix) from error
    if version != SCHEMA_VERSION:
        what = f"chunk directory of schema version {version}; this kiem reads {SCHEMA_VERSION}"
        raise bad_input(str(file), what, "Make it again with preprocess.py --overwrite.")
    if "sha256" in manifest and not is_intact:
        raise damaged(str(file), "is damaged (its content has another sha256)", MAKE_AGAIN)
    convert(manifest, _Manifest, where=str(file), fix=MAKE_AGAIN, exit_code=ExitCode.DAMAGED)
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
        raise damaged(str(file), f"cannot be read ({error.strerror})", MAKE_AGAIN) from error
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
        copy = np.stack(self._views(numbers))
        self._unmap()
        return copy

    def read_all(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the number of the first token of each block, and the block."""
        for number, (row, block) in enumerate(zip(self.first_rows, self.blocks, strict=True)):
            yield int(row) * self.chunk_size, block
            if number % _BLOCKS_MAPPED == 0:
                self._unmap()

    def read_ahead(self, numbers: np.ndarray) -> None:
        """Has the system read chunks from the disk while this program goes on."""
        library = ctypes.CDLL(None)
        for view in self._views(numbers):
            start = view.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
            size = view.ctypes.data + view.nbytes - start
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_WILLNEED)

    def _unmap(self) -> None:
        # The system keeps what was read in its own cache. Mapped as well, it would count as memory
        # of this program, which in a long training would seem to grow by the size of the data.
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED)

    def _views(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Returns chunks by number, without reading them."""
        which = np.searchsorted(self.first_rows, numbers, side="right") - 1
        return [
            self.blocks[block][number - self.first_rows[block]]
            for block, number in zip(which, numbers, strict=True)
        ]


def join_chunks(several: Sequence[Chunks]) -> Chunks:
    """Returns chunks of one size, numbered one after the other, as one."""
    sizes = [chunks.num_chunks for chunks in several]
    firsts = [chunks.first_rows + sum(sizes[:place]) for place, chunks in enumerate(several)]
    return Chunks(
        [block for chunks in several for block in chunks.blocks],
        np.concatenate(firsts),
        sum(sizes),
        several[0].chunk_size,
        [mapping for chunks in several for mapping in chunks.mappings],
    )


def open_split(path: Path, manifest: dict[str, Any], split: str) -> Chunks:
    """Maps the shards of a split into memory; nothing is copied."""
    return _open(path, manifest, manifest["splits"][split]["shards"])


def open_test_sources(path: Path, manifest: dict[str, Any]) -> Chunks | None:
    """Maps what `open_split` maps of the test split, with sources in the place of tokens.

    Returns:
        Places in the manifest's `source_names`, NO_SOURCE for padding; None if the chunk directory
        has no such shards.
    """
    shards = manifest["splits"]["test"].get("source_shards", [])
    return _open(path, manifest, shards) if shards else None


def _open(path: Path, manifest: dict[str, Any], shards: list[dict[str, Any]]) -> Chunks:
    chunk_size = manifest["options"]["chunk_size"]
    mappings: list[mmap.mmap] = []
    blocks: list[np.ndarray] = []
    for shard in shards:
        file = path / shard["file"]
        try:
            with file.open("rb") as opened:
                mappings.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
            table = pa.ipc.open_stream(pa.py_buffer(mappings[-1])).read_all()
        except (pa.ArrowException, OSError, ValueError) as error:  # the last for an empty file
            raise damaged(str(file), f"cannot be read ({error})", MAKE_AGAIN) from error
        is_of_chunks = table.schema.types == [pa.list_(pa.int32(), chunk_size)]
        if not is_of_chunks or len(table) != shard["chunks"]:
            what = f"does not have {shard['chunks']} chunks of {chunk_size} tokens"
            raise damaged(str(file), what, MAKE_AGAIN)
        for batch in table.column(0).chunks:
            blocks.append(to_numpy(batch.flatten()).reshape(-1, chunk_size))
    rows = np.array([len(block) for block in blocks], dtype=np.int64)
    return Chunks(blocks, np.cumsum(rows) - rows, int(rows.sum()), chunk_size, mappings)
