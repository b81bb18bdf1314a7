"""How a file is read, by its name and for some names its first line; see docs/formats.md."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from pathlib import Path, PurePath
from typing import BinaryIO, Literal, NamedTuple, cast

from kiem.core.json_input import JsonError, parse_json
from kiem.data.read.rows import (
    BOM,
    HEAD_BYTES,
    MAX_DOCUMENT_BYTES,
    bad_input,
    damaged,
    foreign_content,
    lfs_pointer,
)

Kind = Literal["text", "json lines", "json", "csv", "tsv", "parquet", "arrow", "wikiextractor"]

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
WHOLE: tuple[Kind, ...] = ("parquet", "arrow")  # compressed inside, so not as files
READABLE = (
    f"{', '.join(suffix for suffix, kind in KINDS.items() if kind not in WHOLE)}, "
    f"also with {', '.join(COMPRESSIONS)} after it, "
    f"or {', '.join(suffix for suffix, kind in KINDS.items() if kind in WHOLE)}"
)
WITH_COLUMNS = ", ".join(suffix for suffix, kind in KINDS.items() if kind != "text")
# What libraries put beside data, which is no text to read.
_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_BLOCK_BYTES = 1 << 17
# What the libraries raise at compressed bytes that are damaged; OSError when it has no number.
DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)


class Format(NamedTuple):
    """How a file is read.

    Attributes:
        kind: of content.
        compression: gzip, zstd, bzip2 or xz; None: not compressed.
    """

    kind: Kind
    compression: str | None = None


def format_of(name: str) -> Format | None:
    """Returns how a file of this name is read, None if it is not. Upper case does not matter."""
    stem, suffix = _split(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        stem, suffix = _split(stem)
    if not suffix and re.fullmatch(r"wiki_\d+", stem):
        return Format("wikiextractor", compression)
    kind = KINDS.get(suffix)
    if kind is None or (compression and kind in WHOLE):
        return None
    return Format(kind, compression)


def _split(name: str) -> tuple[str, str]:
    """Returns stem and suffix, in a tenth of PurePath's time."""
    stem, dot, last = name.rpartition(".")
    return (stem, dot + last) if stem else (name, "")


def is_metadata(name: str) -> bool:
    """Says whether a file in a folder only describes the others, as those of `datasets` do."""
    return name in _METADATA


def shown_suffix(name: str) -> str:
    """Returns what a file that is not read is counted under: its suffix, in lower case."""
    if is_metadata(name):
        return name
    suffixes = PurePath(name.lower()).suffixes[-2:]
    if len(suffixes) == 2 and suffixes[1] not in COMPRESSIONS:
        del suffixes[0]
    suffix = "".join(suffixes)
    return suffix if suffix.isprintable() and suffix else "without suffix"


def open_content(path: Path, compression: str | None) -> BinaryIO:
    """Opens a file to read what it was before it was compressed."""
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == "bzip2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if compression == "xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if compression == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), _BLOCK_BYTES)
    return path.open("rb", buffering=_BLOCK_BYTES)


def is_damage(compression: str | None, error: Exception) -> bool:
    """Says whether one of DECOMPRESSION_ERRORS is the file's fault, not the disk's."""
    return compression is not None and getattr(error, "errno", None) is None


def decompression_error(place: str, compression: str | None, error: Exception) -> Exception:
    """Returns the error to raise for one of DECOMPRESSION_ERRORS."""
    return damaged(place, str(compression), error) if is_damage(compression, error) else error


def look_inside(path: Path, name: str, named: Format | None, is_cut: bool) -> Format:
    """Returns how a file is read, where its name does not say it all.

    Args:
        path: the file.
        name: what it is called in messages.
        named: how its name says that it is read; None for standard input.
        is_cut: whether files of text are cut into documents.

    Raises:
        UserError: it is compressed or encoded in a way that its name does not say, or damaged.
    """
    kind, compression = named or Format("text")
    if kind in WHOLE:
        with path.open("rb") as content:
            if (found := lfs_pointer(content.read(HEAD_BYTES))) is not None:
                raise bad_input(name, found.what, found.fix)
        return Format(kind, compression)
    if kind == "text" and named is not None and not is_cut:
        return Format(kind, compression)
    try:
        with open_content(path, compression) as file:
            head = file.read(HEAD_BYTES)
            if (found := foreign_content(head)) is not None:
                raise bad_input(name, found.what, found.fix)
            if kind not in ("json", "wikiextractor") and named is not None:
                return Format(kind, compression)
            head = head.removeprefix(BOM).lstrip()
            if head.startswith(b"[") and kind != "wikiextractor":
                return Format("json", compression)
            if head.startswith(b"{"):
                first = head + file.readline(MAX_DOCUMENT_BYTES)
                return Format("json lines" if _is_line(first) else "json", compression)
            return Format(kind, compression)
    except DECOMPRESSION_ERRORS as error:
        if not is_damage(compression, error):
            raise
        return Format(kind, compression)  # reading finds the damage again, and the line


def _is_line(data: bytes) -> bool:
    """Says whether the first line is JSON by itself."""
    try:
        parse_json(data.split(b"\n", 1)[0], is_strict=False)
    except JsonError:
        return False
    return True
