"""What a chunk directory's manifest.json must be like: types, ranges, names inside the folder."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^(\w+/)?\w[\w.-]*$")]  # of a file inside


class Version(msgspec.Struct):
    """What the manifests of all versions have."""

    schema_version: int


class _Shard(msgspec.Struct):
    file: _Name
    chunks: _Count
    bytes: _Count
    sha256: str


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


class _Splits(msgspec.Struct):
    train: _Split
    test: _Split


class _Options(msgspec.Struct):
    chunk_size: Annotated[int, msgspec.Meta(ge=2, lt=1 << 31)]


class _Tokenizer(msgspec.Struct):
    sha256: str


class Manifest(msgspec.Struct):
    """A manifest of this version; it says more, which is only shown."""

    options: _Options
    splits: _Splits
    tokenizer: _Tokenizer
    special_ids: dict[str, _Count]
    documents_read: _Count
    rejected: dict[str, _Count]
    files: dict[_Name, str]
