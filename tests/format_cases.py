"""The table of formats: what files hold, and what must be read of them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

END = "<|endoftext|>"


@dataclass(frozen=True)
class Case:
    """A file and what is read of it.

    Attributes:
        file: its name.
        content: its bytes.
        documents: what is read, bad rows left out.
        places: where those are; by default they are not looked at.
        message: what stops the reading at a bad row or file, with {path}.
        column: --text-column.
        separator: --document-separator.
    """

    file: str
    content: bytes
    documents: tuple[str, ...] = ()
    places: tuple[int, ...] | None = None
    message: str | None = None
    column: str = "text"
    separator: str | None = None


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": t}, ensure_ascii=False).encode() + b"\n" for t in texts)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def parquet(columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return file.getvalue()


def stream(columns: Any) -> bytes:
    table = pa.table(columns)
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return file.getvalue()


def feather(columns: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.feather.write_feather(pa.table(columns), file)
    return file.getvalue()


def strings(kind: Any, *values: bytes) -> Any:
    """A column of strings, or of bytes, that are not checked to be UTF-8."""
    return (
        pa.array(values, pa.binary()).view(pa.string())
        if kind is None
        else pa.array(list(values), kind)
    )


A, B = "Een dag\nin mei.", 'Tweede "tekst": één, twee € 🙂'
AB = lines(A, B)
TRANSLATIONS = [{"nl": A, "en": "x"}, {"nl": B, "en": None}]
TABLE = f'id,text\r\n1,"{A}"\r\n2,"{B.replace(chr(34), chr(34) * 2)}"\r\n'
STORY = f"{A}\n{END}\n{B}\n"
CSV_FIX = "has 3 fields; the first line names 2"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NO_TEXT = "no column 'text'; there is "

CASES = {
    "compressed text": Case("a.txt.gz", gzip.compress(A.encode()), (A,)),
    "upper case": Case("A.TXT.GZ", gzip.compress(A.encode()), (A,)),
    ".txt.xz, as CC-100": Case(
        "nl.txt.xz", lzma.compress(f"{A}\n\n{B}\n".encode()), (A, B), (1, 4),
        separator="blank-lines",
    ),
    ".ndjson": Case("a.ndjson", AB, (A, B), (1, 2)),
    ".JSONL": Case("a.JSONL", AB, (A, B)),
    ".jsonl.zst": Case("a.jsonl.zst", zstd(AB), (A, B), (1, 2)),
    "zstd frames": Case("a.jsonl.zst", zstd(AB[:9]) + zstd(AB[9:]), (A, B)),
    "gzip members": Case("a.json.gz", gzip.compress(AB[:9]) + gzip.compress(AB[9:]), (A, B)),
    "bzip2 streams": Case("a.jsonl.bz2", bz2.compress(AB[:9]) + bz2.compress(AB[9:]), (A, B)),
    "xz streams": Case("a.jsonl.xz", lzma.compress(AB[:9]) + lzma.compress(AB[9:]), (A, B)),
    "zstd cut": Case("a.txt.zst", zstd(AB)[:-3], message="{path}: damaged zstd (Truncated"),
    "zstd with rubbish after it": Case(
        "a.jsonl.zst", zstd(AB) + b"x" * 9, (), message="{path}: damaged zstd ("
    ),
    "bzip2 cut": Case("a.jsonl.bz2", bz2.compress(AB)[:-9], message="{path}: damaged bzip2 ("),
    "xz cut": Case("a.json.xz", lzma.compress(AB)[:-9], message="{path}: damaged xz ("),
    "empty and compressed": Case("a.json.zst", b"", message="{path}: the file is empty"),
    "zstd called .txt": Case("a.txt", zstd(AB), message="{path}:1: not UTF-8"),
    "PDF": Case("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", message="{path}:2: not UTF-8"),
    **{
        f"Git LFS pointer in {name}": Case(name, LFS_POINTER, message=f"{{path}}{place}: a pointer")
        for name, place in {"a.txt": ":1", "a.jsonl": "", "a.parquet": "", "a.csv": ""}.items()
    },
    # .json
    "lines in .json": Case("a.json", AB, (A, B), (1, 2)),
    "C4": Case("c4-nl.tfrecord-0.json.gz", gzip.compress(AB), (A, B), (1, 2)),
    "array": Case("a.json", json.dumps([{"text": A}, {"text": B}]).encode(), (A, B), (1, 2)),
    "indented array": Case(
        "a.json", json.dumps([{"text": A}, {"text": B}], indent=2).encode(), (A, B), (1, 2)
    ),
    "array of strings": Case("a.json", json.dumps([A, B]).encode(), (A, B), (1, 2)),
    "one object": Case("a.json", json.dumps({"text": A, "n": 1}, indent=1).encode(), (A,), (1,)),
    "indented objects, as jq writes": Case(
        "a.json", b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ("a", "b"), (1, 2)
    ),
    "BOM": Case("a.json", "\ufeff[\"a\"]".encode(), ("a",)),
    "empty array": Case("a.json", b" [ ] "),
    "deep in an array": Case(
        "a.json", b"[" * 100_000, message="{path}:1: damaged JSON (maximum recursion depth"
    ),
    "bad rows in an array": Case(
        "a.json", b'["a", 3, {"b": 1}, {"text": "\xff"}, {"text": "c", "x": "\xff"}]', ("a", "c"),
        (1, 5), message="{path}:2: not a JSON object",
    ),
    "array cut": Case("a.json", b'[\n"a",\n"b"', message="{path}:3: damaged JSON (Expecting"),
    "string cut": Case("a.json", b'[\n"a",\n"b', message="{path}:3: damaged JSON (Unterminated"),
    "no comma": Case("a.json", b'[\n"a"\n"b"]', message="{path}:3: damaged JSON (Expecting"),
    "after the array": Case("a.json", b'["a"]\n"b"\n["c"]', ("a", "b", "c"), (1, 2, 3)),
    "first line bad": Case("a.json", b'{"text": \n' + AB, message="{path}:3: damaged JSON ("),
    "surrogate in an array": Case(
        "a.json", b'["\\ud800"]', message="{path}:1: half a surrogate pair at character 0"
    ),
    # .csv, .tsv
    ".csv": Case("a.csv", TABLE.encode(), (A, B), (2, 4)),
    ".csv.gz": Case("a.csv.gz", gzip.compress(TABLE.encode()), (A, B), (2, 4)),
    "BOM and semicolons, as Dutch Excel": Case(
        "a.csv", f'\ufeffid;text\r\n1;"a, b"\r\n2;{"c" * 200_000}\r\n'.encode(),
        ("a, b", "c" * 200_000),
    ),
    ".tsv": Case("a.tsv", b'id\ttext\n1\ta, b\n\n2\t"c\td"\n', ("a, b", "c\td"), (2, 4)),
    "only a column of text": Case("a.csv", b"text\na; b\n", ("a; b",)),
    "no such column in .csv": Case(
        "a.csv", b"1,een\n2,twee\n", message="{path}:1: " + NO_TEXT + "'1', 'een'"
    ),
    "column twice": Case("a.csv", b"text,text\na,b\n", message="{path}:1: has several columns"),
    "comma in a text": Case(
        "a.csv", b"id,text\n1,a, b\n2,c\n", ("c",), (3,), "{path}:2: " + CSV_FIX
    ),
    "quote that does not end": Case(
        "a.csv", b'id,text\n1,"a\n2,b\n', message="{path}:3: not a table (unexpected end of data"
    ),
    "latin-1 in .csv": Case(
        "a.csv", b"id,text\n\xff,a\n2,caf\xe9\n", ("a",), (2,), "{path}:3: not UTF-8"
    ),
    "header alone": Case("a.csv", b"text\n"),
    # columns in columns
    "key in an object": Case(
        "a.jsonl", json.dumps({"translation": {"nl": A}}).encode(), (A,), column="translation.nl"
    ),
    "key with a dot goes first": Case(
        "a.jsonl", b'{"a": {"b": "no"}, "a.b": "yes"}\n{"a": {"b": "this"}}', ("yes", "this"),
        column="a.b",
    ),
    "keys with dots in objects": Case(
        "a.json", b'[{"a.b": {"c.d": "x"}}]', ("x",), column="a.b.c.d"
    ),
    "no such key in the object": Case(
        "a.jsonl", b'{"a": {"c": "x"}, "d": 1}', column="a.b",
        message="{path}:1: no column 'a.b'; there is 'a.c', 'd'",
    ),
    "column in a column": Case(
        "a.parquet", parquet({"translation": TRANSLATIONS}), (A, B), column="translation.nl"
    ),
    "column in one that is null": Case(
        "a.parquet", parquet({"t": [{"nl": A}, None]}), (A,), (1,), column="t.nl",
        message="{path}:2: the text is NoneType, not a string",
    ),
    "column with a dot goes first": Case(
        "a.parquet", parquet({"a": [{"b": "no"}], "a.b": ["yes"]}), ("yes",), column="a.b"
    ),
    "no such column in the column": Case(
        "a.parquet", parquet({"a": [{"c": "x"}], "d": [1]}), column="a.b",
        message="{path}: no column 'a.b'; there is 'a.c', 'd'",
    ),
    # kinds of columns
    **{
        f"{kind} in Parquet": Case(
            "a.parquet", parquet({"text": strings(kind, A.encode(), b"\xff", B.encode())}), (A, B),
            (1, 3), "{path}:2: not UTF-8",
        )
        for kind in (None, pa.binary(), pa.large_binary())
    },
    "string_view in Parquet": Case(
        "a.parquet", parquet({"text": pa.array([A, B], pa.string_view())}), (A, B)
    ),
    "dictionary of bytes": Case(
        "a.parquet", parquet({"text": pa.array([b"a", b"a"]).dictionary_encode()}), ("a", "a")
    ),
    **{
        f"{kind} in {name}": Case(
            name, make({"text": strings(kind, A.encode(), b"\xff", B.encode())}), (A, B), (1, 3),
            "{path}:2: not UTF-8",
        )
        for name, make in (("data-0.arrow", stream), ("a.feather", feather))
        for kind in (None, pa.binary(), pa.large_binary(), pa.binary_view())
    },
    "column in a column of Arrow": Case(
        "a.arrow", stream({"translation": TRANSLATIONS}), (A, B), column="translation.nl"
    ),
    "Arrow cut": Case("a.arrow", stream({"text": [A, B]})[:-8], message="{path}: damaged Arrow ("),
    "no Arrow": Case("a.feather", AB, message="{path}: damaged Arrow (the end is missing)"),
    "numbers in Arrow": Case(
        "a.arrow", stream({"text": [1]}), message="{path}: column 'text' is int64, not a string"
    ),
    # WikiExtractor
    "wiki_00": Case("wiki_00", AB, (A, B), (1, 2)),
    "wiki_07.bz2": Case("wiki_07.bz2", bz2.compress(AB), (A, B), (1, 2)),
    # --document-separator
    "one document": Case("a.txt", STORY.encode(), (STORY,), (1,)),
    "separated": Case("a.txt", STORY.encode(), (A, B), (1, 4), separator=END),
    "separated, CRLF and BOM": Case(
        "a.txt", f"\ufeff{END}\r\na\r\n {END} \r\n\r\nb\r\nc\r\n{END}\r\n\r\n".encode(),
        ("a", "b\r\nc"), (2, 5), separator=END,
    ),
    "separator in a line": Case(
        "a.txt", f"a {END} b\n{END}\nc".encode(), (f"a {END} b", "c"), (1, 3), separator=END
    ),
    "separated and compressed": Case(
        "a.txt.gz", gzip.compress(STORY.encode()), (A, B), (1, 4), separator=END
    ),
    "blank lines": Case(
        "a.txt", f"\n \n{A}\n\n\t\n{B}\n\n\n".encode(), (A, B), (3, 7), separator="blank-lines"
    ),
    "every line": Case(
        "a.txt", b"\xef\xbb\xbfa\r\n\nb ", ("a", "b "), (1, 3), separator="every-line"
    ),
    "one of them not UTF-8": Case(
        "a.txt", f"a\n{END}\nb\n".encode() + b"\xff\n" + f"{END}\nc".encode(), ("a", "c"), (1, 6),
        "{path}:4: not UTF-8", separator=END,
    ),
    "no such line": Case(
        "a.txt", A.encode(), separator=END,
        message=f"--document-separator {END}: has no effect: no file of text has such a line",
    ),
    "no text to cut": Case(
        "a.jsonl", AB, separator=END,
        message="--document-separator: has no effect on this source, which has no files of text",
    ),
    "separator of two lines": Case(
        "a.txt", AB, separator="a\nb", message="--document-separator: 'a\\nb' is not the text of"
    ),
    "no separator": Case(
        "a.txt", AB, separator="", message="--document-separator: '' is not the text of one line"
    ),
}  # fmt: skip
