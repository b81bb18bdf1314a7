"""The table of formats: suffixes and their readers, as docs/formats.md explains them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePath

from kiem.core.errors import UserError
from kiem.data.read.columnar import read_arrow, read_parquet
from kiem.data.read.json_files import parse_line, read_json, read_json_lines
from kiem.data.read.rows import BOM, Problem, Row, lfs_pointer
from kiem.data.read.source_file import (
    COMPRESSIONS,
    MAX_DOCUMENT_BYTES,
    STANDARD_INPUT,
    Section,
    SourceFile,
    reading_errors,
)
from kiem.data.read.tables import read_table
from kiem.data.read.text_files import read_text

READERS: dict[str, Callable[[Section], Iterator[Row]]] = {
    "text": read_text,
    "json lines": read_json_lines,
    "json": read_json,
    "csv": read_table,
    "tsv": partial(read_table, delimiter="\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
}
KINDS: dict[str, str] = {
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
_COMPRESSED_INSIDE = ("parquet", "arrow")
READABLE = (
    f"{', '.join(suffix for suffix, kind in KINDS.items() if kind not in _COMPRESSED_INSIDE)}, "
    f"also with {', '.join(COMPRESSIONS)} after it, "
    f"or {', '.join(suffix for suffix, kind in KINDS.items() if kind in _COMPRESSED_INSIDE)}"
)
WITH_COLUMNS = ", ".join(suffix for suffix, kind in KINDS.items() if kind != "text")
_HEAD_BYTES = 1 << 12  # of a file, by which its type is known
# Descriptions that `datasets` puts beside data.
METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


def format_of(name: str) -> tuple[str, str | None] | None:
    """Returns the kind and compression of a file by its name, in any case; None: not read."""
    path = PurePath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    if compression:
        path = PurePath(path.stem)
    is_wiki = re.fullmatch(r"wiki_\d+", path.name)  # as WikiExtractor names its files
    kind = "json lines" if is_wiki else KINDS.get(path.suffix)
    if kind is None or (compression and kind in _COMPRESSED_INSIDE):
        return None
    return kind, compression


def shown_suffix(name: str) -> str:
    """Returns the suffix under which a file that is not read is counted, in lower case."""
    if name in METADATA:
        return name
    path = PurePath(name.lower())
    suffix = path.suffix
    if suffix in COMPRESSIONS:
        suffix = PurePath(path.stem).suffix + suffix
    return suffix if suffix.isprintable() and suffix else "without suffix"


def look_inside(file: SourceFile) -> SourceFile:
    """Returns a file with its true kind, where its name does not tell.

    Raises:
        UserError: it only points to its content.
    """
    is_named = file.name != STANDARD_INPUT
    if file.kind == "text" and is_named and file.separator is None:
        return file  # checked when its one document is read
    may_be_lines = file.kind == "json" or not is_named
    try:
        with reading_errors(file.name, file.compression), file.open() as content:
            head = content.read(_HEAD_BYTES)
            start = head.removeprefix(BOM).lstrip()
            if may_be_lines and start.startswith(b"{"):
                start += content.readline(MAX_DOCUMENT_BYTES)
    except UserError:
        return file  # reading will find the damage, and its line
    if (found := lfs_pointer(head)) is not None:
        raise found.error(file.name)
    if not may_be_lines or not start.startswith((b"[", b"{")):
        return file
    is_line = start[:1] == b"{" and not isinstance(parse_line(start.split(b"\n", 1)[0]), Problem)
    return file._replace(kind="json lines" if is_line else "json")
