"""The table of malformed and hostile input: what each file holds, and what must become of it."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BOM = "\ufeff"


def zipped(data: bytes) -> bytes:
    """Returns gzip data without the time, whose bytes would change with every run."""
    return gzip.compress(data, mtime=0)


ODD_TEXTS = {
    "right to left": "שלום עולם، مرحبا \u200f\u202eabc\u202c",
    "emoji with joiners": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇳🇱",
    "combining marks": "e\u0301e\u0301 Z\u0351\u036b\u0343\u036a\u0302 a\u0301\u0301\u0301",
    "private use": "\ue000\uf8ff\U000f0000\U0010fffd",
    "noncharacters": "a\ufffe\uffff\ufdd0\U0001ffffb",
    "line and paragraph separators": "een\u2028twee\u2029drie\x85vier",
    "NUL and control characters": "a\x00b\x01\x1b[31m\x7f",
    "BOM in the middle": f"een{BOM}twee",
    "CRLF and lone CR": "een\r\ntwee\rdrie\r",
    "space of many kinds": " \u00a0\u2003x\u3000\t\v\f ",
    "control tokens": "<eos><bos><pad><unk><image_soft_token><unused0><start_of_turn>",
    "byte tokens": "<0x00><0xFF><0xE2>\ufffd",
    "the letter of spaces": "a\u2581b \u2581\u2581</",
    "the entry across a space": "a> </b> ></ > </",
    "beyond the basic plane": "𐍈𝔘𠮷\U000e0001",
    "one letter": "x",
    "one long word": "ij" * 20_000,
}


@dataclass(frozen=True)
class Case:
    """A file and its fate.

    Attributes:
        file: its name.
        content: its bytes, or what makes it.
        documents: what is kept of it when bad documents are skipped.
        rejected: reason -> how many rows are rejected then.
        message: the error that stops the program, with {path}; None when nothing is wrong. One that
            ends in "..." goes on in a library's words.
        always: stops also when bad documents are skipped.
    """

    file: str
    content: bytes | Callable[[Path], object]
    documents: tuple[str, ...] = ()
    rejected: dict[str, int] = field(default_factory=dict)
    message: str | None = None
    always: bool = False


def good(file: str, content: bytes, *documents: str) -> Case:
    return Case(file, content, documents)


def bad(file: str, content: bytes, message: str, reason: str, *documents: str, n: int = 1) -> Case:
    return Case(file, content, documents, {reason: n}, f"{{path}}:{message}")


def damaged(file: str, content: bytes | Callable[[Path], object], message: str) -> Case:
    return Case(file, content, message=f"{{path}}{message}", always=True)


def line(text: Any, **more: Any) -> bytes:
    return json.dumps({"text": text, **more}, ensure_ascii=False).encode() + b"\n"


def parquet(columns: Any, **options: Any) -> bytes:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0x40
    return bytes(changed)


def _strings(*values: bytes) -> pa.Array:
    """A column of strings that are not checked to be UTF-8."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def _with_bad_footer() -> bytes:
    data = parquet(COLUMN)
    return flipped(data, -8 - int.from_bytes(data[-8:-4], "little"))


def _no_row_groups() -> bytes:
    file = io.BytesIO()
    pq.ParquetWriter(file, pa.schema([("text", pa.string())])).close()
    return file.getvalue()


def _twins(name: str) -> pa.Table:
    return pa.table([["a"], ["b"], ["c"]], names=["text", name, name])


AB = line("a") + line("b")
MANY = b"".join(line(f"tekst nummer {n} " * 9) for n in range(400))
COLUMN = {"text": [f"tekst nummer {n} " * 9 for n in range(400)]}
PLAIN = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
NOT_OBJECT = "1: not a JSON object"
NO_TEXT = "1: no column 'text'; there is "
DEEP = b"[" * 100_000 + b"]" * 100_000
UTF8 = ": not UTF-8"
GZIP, PARQUET = ": damaged gzip (...", ": damaged Parquet (..."

TXT = {
    "empty text file": bad("in.txt", b"", "1: the text is empty", "empty"),
    "only white space": bad("in.txt", b" \n\t\r\n\xc2\xa0", "1: the text is empty", "empty"),
    "only a BOM": bad("in.txt", BOM.encode(), "1: the text is empty", "empty"),
    "BOM first": good("in.txt", (BOM + "een").encode(), "een"),
    "two BOMs": good("in.txt", (BOM * 2 + "een").encode(), BOM + "een"),
    "no line end at the end": good("in.txt", b"een\ntwee", "een\ntwee"),
    "lone continuation byte": bad("in.txt", b"een\n\x80", "2" + UTF8, "not UTF-8"),
    "overlong": bad("in.txt", b"een\xc0\xaf", "1" + UTF8, "not UTF-8"),
    "overlong NUL": bad("in.txt", b"een\xc0\x80", "1" + UTF8, "not UTF-8"),
    "surrogate in UTF-8": bad("in.txt", b"een\xed\xa0\x80", "1" + UTF8, "not UTF-8"),
    "beyond Unicode": bad("in.txt", b"\xf4\x90\x80\x80", "1" + UTF8, "not UTF-8"),
    "cut at the end": bad("in.txt", "a\nb\n€".encode()[:-1], "3" + UTF8, "not UTF-8"),
    "UTF-16 with BOM": bad("in.txt", "een".encode("utf-16"), "1" + UTF8, "not UTF-8"),
    "latin-1": bad("in.txt", "café\n".encode("latin-1"), "1" + UTF8, "not UTF-8"),
    **{f"{name} (.txt)": good("in.txt", text.encode(), text) for name, text in ODD_TEXTS.items()},
}
JSONL = {
    "empty file": damaged("in.jsonl", b"", ": the file is empty"),
    "only blank lines": good("in.jsonl", b"\n\r\n  \n\t\n\n"),
    "blank lines between": good("in.jsonl", b"\n" + line("a") + b"\n\n" + line("b"), "a", "b"),
    "CRLF": good("in.jsonl", AB.replace(b"\n", b"\r\n"), "a", "b"),
    "lone CR": bad(
        "in.jsonl", AB.replace(b"\n", b"\r"), "1: not JSON (Extra data at character 15)", "not JSON"
    ),
    "BOM at the start": good("in.jsonl", BOM.encode() + AB, "a", "b"),
    "BOM where files were joined": good("in.jsonl", AB + BOM.encode() + line("c"), "a", "b", "c"),
    "BOM inside a line": bad(
        "in.jsonl", b'{\xef\xbb\xbf"text": "a"}', "1: not JSON (...", "not JSON"
    ),
    "no line end": good("in.jsonl", AB[:-1], "a", "b"),
    "empty string": bad("in.jsonl", AB + line(""), "3: the text is empty", "empty", "a", "b"),
    "white space": bad("in.jsonl", line(" \n\u2003"), "1: the text is empty", "empty"),
    "no column": bad("in.jsonl", b'{"tekst": "a"}', NO_TEXT + "'tekst'", "no such column"),
    "empty object": bad("in.jsonl", b"{}", NO_TEXT + "nothing", "no such column"),
    **{
        f"text is {kind}": bad(
            "in.jsonl", line(value) + AB, f"1: the text is {kind}, not a string", "not a string",
            "a", "b",
        )
        for kind, value in {
            "int": 3, "float": 1.5, "bool": True, "NoneType": None, "list": ["a"], "dict": {"a": 1}
        }.items()
    },
    "text is NaN": bad(
        "in.jsonl", b'{"text": NaN}', "1: the text is float, not a string", "not a string"
    ),
    "text is a huge number": bad(
        "in.jsonl", b'{"text": %s}' % (b"9" * 5000), "1: the text is int, not a string",
        "not a string",
    ),
    "same key twice, the last counts": good("in.jsonl", b'{"text": 1, "text": "a"}', "a"),
    "same key twice, the last is bad": bad(
        "in.jsonl", b'{"text": "a", "text": 1}', "1: the text is int, not a string", "not a string"
    ),
    "NaN and Infinity elsewhere": good("in.jsonl", line("a", x=float("nan"), y=-1e999), "a"),
    "huge number elsewhere": good("in.jsonl", b'{"text":"a","n":%s}' % (b"9" * 5000), "a"),
    "huge number as source": good("in.jsonl", b'{"text":"a","source":%s}' % (b"9" * 5000), "a"),
    "half a pair as source": good("in.jsonl", b'{"text":"a","source":"\\ud800"}', "a"),
    "odd sources": good("in.jsonl", line("a", source=["x"]) + line("b", source=""), "a", "b"),
    "key in escapes": good("in.jsonl", b'{"te\\u0078t": "\\u0061"}', "a"),
    "pair in escapes": good("in.jsonl", b'{"text": "\\ud83d\\ude00\\u0000"}', "😀\0"),
    "half a pair": bad(
        "in.jsonl", AB + b'{"text": "a\\ud800"}', "3: half a surrogate pair at character 1",
        "surrogate", "a", "b",
    ),
    "pair the wrong way round": bad(
        "in.jsonl", b'{"text": "\\ude00\\ud83d"}', "1: half a surrogate pair at character 0",
        "surrogate",
    ),
    "deep in the text": bad(
        "in.jsonl", AB + b'{"text": ' + DEEP + b"}", "3: not JSON (nested too deeply)", "not JSON",
        "a", "b",
    ),
    "deep elsewhere": bad(
        "in.jsonl", b'{"text": "a", "x": ' + DEEP + b"}\n" + AB, "1: not JSON (nested too deeply)",
        "not JSON", "a", "b",
    ),
    "deep and unfinished": bad(
        "in.jsonl", b'{"a":' * 100_000, "1: not JSON (nested too deeply)", "not JSON"
    ),
    "cut off": bad("in.jsonl", AB[:-4], "2: not JSON (Unterminated string ...", "not JSON", "a"),
    "comma at the end": bad("in.jsonl", b'{"text": "a",}', "1: not JSON (...", "not JSON"),
    "single quotes": bad("in.jsonl", b"{'text': 'a'}", "1: not JSON (...", "not JSON"),
    "bare tab in a string": bad("in.jsonl", b'{"text": "a\tb"}', "1: not JSON (...", "not JSON"),
    "NUL in a string": bad("in.jsonl", b'{"text": "a\0b"}', "1: not JSON (...", "not JSON"),
    "NULs at the end": bad("in.jsonl", AB + b"\0" * 99, "3: not JSON (...", "not JSON", "a", "b"),
    "two objects on a line": bad(
        "in.jsonl", line("a")[:-1] + AB, "1: not JSON (Extra data at character 14)", "not JSON", "b"
    ),
    "an array of all": bad("in.jsonl", b'[{"text": "a"}, {}]', NOT_OBJECT, "not an object"),
    "an array over lines": bad(
        "in.jsonl", b'[\n{"text": "a"},\n{"text": "b"}\n]', "1: not JSON (...", "not JSON", "b", n=3
    ),
    "a string": bad("in.jsonl", b'"a"', NOT_OBJECT, "not an object"),
    "indented JSON": bad(
        "in.jsonl", b'{\n "text": "a"\n}', "1: not JSON (...", "not JSON", n=3
    ),
    "invalid UTF-8 in the text": bad(
        "in.jsonl", AB + b'{"text": "\xff"}\n' + AB, "3" + UTF8, "not UTF-8", "a", "b", "a", "b"
    ),
    "invalid UTF-8 elsewhere": good("in.jsonl", b'{"text": "a", "url": "\xff"}', "a"),
    "JSON Lines in UTF-16": bad(
        "in.jsonl", '{"text": "a"}'.encode("utf-16"), "1" + UTF8, "not UTF-8"
    ),
    "compressed without .gz": bad("in.jsonl", zipped(b"a" * 99), "1" + UTF8, "not UTF-8"),
    "odd texts": good("in.jsonl", b"".join(map(line, ODD_TEXTS.values())), *ODD_TEXTS.values()),
}  # fmt: skip
GZ = {
    "gzip of nothing": good("in.jsonl.gz", zipped(b"")),
    "empty .gz": damaged("in.jsonl.gz", b"", ": the file is empty"),
    "members one after the other": good(
        "in.jsonl.gz", zipped(AB[:20]) + zipped(AB[20:]), "a", "b"
    ),
    "zeros after the end": good("in.jsonl.gz", zipped(AB) + b"\0" * 64, "a", "b"),
    "rubbish after the end": damaged("in.jsonl.gz", zipped(AB) + b"x" * 9, GZIP),
    "gzip cut in the middle": damaged("in.jsonl.gz", zipped(MANY)[:-99], "...damaged gzip"),
    "gzip cut before its checksum": damaged("in.jsonl.gz", zipped(AB)[:-8], GZIP),
    "gzip cut in its header": damaged("in.jsonl.gz", zipped(AB)[:5], GZIP),
    "wrong checksum": damaged("in.jsonl.gz", flipped(zipped(AB), -6), GZIP),
    "wrong length": damaged("in.jsonl.gz", flipped(zipped(AB), -2), GZIP),
    "unknown compression": damaged("in.jsonl.gz", flipped(zipped(AB), 2), GZIP),
    "no gzip": damaged("in.jsonl.gz", b"PK\3\4 something else", GZIP),
    "plain file called .gz": damaged("in.jsonl.gz", AB, GZIP),
    "bad line in gzip": bad(
        "in.jsonl.gz", zipped(AB + b"[1]\n" + AB), "3: not a JSON object", "not an object",
        "a", "b", "a", "b",
    ),
    "odd texts in gzip": good(
        "in.jsonl.gz", zipped(b"".join(map(line, ODD_TEXTS.values()))), *ODD_TEXTS.values()
    ),
}  # fmt: skip
NOT_STRINGS = {
    "int64": [1, 2], "double": [1.5], "bool": [True], "list<element: string>": [["a"]],
    "struct<a: string>": [{"a": "b"}],
    "timestamp[us]": pa.array([2**60], pa.timestamp("us")),
}  # fmt: skip
NULL = "1: the text is NoneType, not a string"
PQ = {
    "no rows": good("in.parquet", parquet({"text": pa.array([], pa.string())})),
    "no row groups": good("in.parquet", _no_row_groups()),
    "empty .parquet": damaged("in.parquet", b"", ": the file is empty"),
    "no Parquet": damaged("in.parquet", AB * 9, PARQUET),
    "no text column": Case(
        "in.parquet", parquet({"tekst": ["a"], "url": ["b"]}), always=True,
        message="{path}: no column 'text'; there is 'tekst', 'url'",
    ),
    **{
        f"column is {kind}": damaged(
            "in.parquet", parquet({"text": values}), f": column 'text' is {kind}, not a string"
        )
        for kind, values in NOT_STRINGS.items()
    },
    "two text columns": damaged(
        "in.parquet", parquet(_twins("text")), ": has several columns 'text'"
    ),
    "two source columns": good("in.parquet", parquet(_twins("source")), "a"),
    "odd source column": good("in.parquet", parquet({"text": ["a"], "source": [{"b": 1}]}), "a"),
    "name that begins another": good("in.parquet", parquet({"text.b": ["x"], "text": ["a"]}), "a"),
    "nulls": bad("in.parquet", parquet({"text": [None, "a", ""]}), NULL, "not a string", "a"),
    "only nulls": bad("in.parquet", parquet({"text": pa.nulls(2)}), NULL, "not a string", n=2),
    "dictionary": good(
        "in.parquet", parquet({"text": pa.array([*"aba"]).dictionary_encode()}), "a", "b", "a"
    ),
    "large strings": good("in.parquet", parquet({"text": pa.array(["a"], pa.large_string())}), "a"),
    "invalid UTF-8 in a column": bad(
        "in.parquet", parquet({"text": _strings(b"a", b"\xff", b"b")}, row_group_size=1),
        "2" + UTF8, "not UTF-8", "a", "b",
    ),
    "Parquet cut at the end": damaged("in.parquet", parquet(COLUMN)[:-20], PARQUET),
    "Parquet cut in the middle": damaged("in.parquet", parquet(COLUMN)[:500], PARQUET),
    "bit flipped in the footer": damaged("in.parquet", _with_bad_footer(), PARQUET),
    "bit flipped in the length": damaged("in.parquet", flipped(parquet(COLUMN), -6), PARQUET),
    "bit flipped in a page": damaged("in.parquet", flipped(parquet(COLUMN, **PLAIN), 999), PARQUET),
    "odd texts in row groups": good(
        "in.parquet", parquet({"text": [*ODD_TEXTS.values()]}, row_group_size=2),
        *ODD_TEXTS.values(),
    ),
}  # fmt: skip
PQ["nulls"].rejected["empty"] = 1
NO_FILE = ": is not a regular file, nor a link to one"
NAME = "{path!a}: the file's name has a line break, a control character or bytes that are not UTF-8"
FILES = {
    "folder with nothing in it": good("in.parquet", Path.mkdir),
    "FIFO": damaged("in.txt", os.mkfifo, NO_FILE),
    "device": damaged(
        "in.txt",
        lambda path: path.symlink_to("/dev/zero"),
        NO_FILE,
    ),
    "dangling link": damaged(
        "in.jsonl",
        lambda path: path.symlink_to("gone"),
        NO_FILE,
    ),
    "link to itself": damaged("in.jsonl", lambda path: path.symlink_to(path), NO_FILE),
    "line break in the name": Case("a\nb.txt", b"x", message=NAME, always=True),
    "name that is not UTF-8": Case(os.fsdecode(b"\xff.txt"), b"x", message=NAME, always=True),
    "quotes and brackets in the name": good("a 'b' \"c\" [d]*{e}.txt", b"x", "x"),
    "emoji in the name": good("👩‍👧.txt", b"x", "x"),
}
CASES = {**TXT, **JSONL, **GZ, **PQ, **FILES}
