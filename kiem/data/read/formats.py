"""The table of formats: which reader reads a file, by its name and sometimes its first line.

docs/formats.md explains it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import Literal, NamedTuple

from kiem.core.errors import UserError
from kiem.data.read.columnar import read_arrow, read_parquet
from kiem.data.read.json_files import parse_line, read_json, read_json_lines
from kiem.data.read.rows import BOM, HEAD_BYTES, Problem, Row, foreign_content, lfs_pointer
from kiem.data.read.section import (
    COMPRESSIONS,
    MAX_DOCUMENT_BYTES,
    Section,
    decompression_errors,
    open_content,
)
from kiem.data.read.tables import read_table
from kiem.data.read.text_files import read_text, read_wikiextractor

Kind = Literal["text", "json lines", "json", "csv", "tsv", "parquet", "arrow", "wikiextractor"]

READERS: dict[Kind, Callable[[Section], Iterator[Row]]] = {
    "text": read_text,
    "json lines": read_json_lines,
    "json": read_json,
    "csv": read_table,
    "tsv": partial(read_table, delimiter="\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
    "wikiextractor": read_wikiextractor,
}
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
WITHOUT_COLUMNS: tuple[Kind, ...] = ("text", "wikiextractor")
_COMPRESSED_INSIDE: tuple[Kind, ...] = ("parquet", "arrow")
READABLE = (
    f"{', '.join(suffix for suffix, kind in KINDS.items() if kind not in _COMPRESSED_INSIDE)}, "
    f"also with {', '.join(COMPRESSIONS)} after it, "
    f"or {', '.join(suffix for suffix, kind in KINDS.items() if kind in _COMPRESSED_INSIDE)}"
)
WITH_COLUMNS = ", ".join(suffix for suffix, kind in KINDS.items() if kind not in WITHOUT_COLUMNS)
# What libraries put beside data, which is no text to read.
_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


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
    if kind is None or (compression and kind in _COMPRESSED_INSIDE):
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


def look_inside(path: Path, name: str, named: Format | None, is_cut: bool) -> Format:
    """Returns how a file is read, where its name does not say it all.

    Args:
        path: the file.
        name: what it is called in messages.
        named: how its name says that it is read; None for standard input.
        is_cut: whether files of text are cut into documents.

    Raises:
        UserError: it is compressed or encoded in a way that its name does not say.
    """
    kind, compression = named or Format("text")
    if kind == "text" and named is not None and not is_cut:
        return named  # its one document says so itself
    has_lines = kind in ("json", "wikiextractor") or named is None  # if it is JSON
    try:
        with decompression_errors(lambda: name, compression), open_content(path, compression) as f:
            head = f.read(HEAD_BYTES)
            start = head.removeprefix(BOM).lstrip()
            if has_lines and start.startswith(b"{"):
                start += f.readline(MAX_DOCUMENT_BYTES)
    except UserError:
        return Format(kind, compression)  # reading finds the damage again, and the line
    found = lfs_pointer(head) if kind in _COMPRESSED_INSIDE else foreign_content(head)
    if found is not None:
        raise found.error(name)
    if has_lines and start.startswith(b"["):
        kind = kind if kind == "wikiextractor" else "json"
    elif has_lines and start.startswith(b"{"):
        is_line = not isinstance(parse_line(start.split(b"\n", 1)[0]), Problem)
        kind = "json lines" if is_line else "json"
    return Format(kind, compression)
