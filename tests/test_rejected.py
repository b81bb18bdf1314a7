"""Rejected documents that are kept: all of them, each with its place, source, reason and text."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.prepare import units
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.data.read import readers
from kiem.data.read.sources import Source
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)
ENGLISH = "the way of all that is to be and not to be that the king of the hill " * 5
SECRET = "wie dit leest heeft de toets gezien waarmee het model straks gemeten wordt"
BAD_LINES = [
    (b"\xff", "not UTF-8"),
    (b'{"text": ', "not JSON"),
    (b"[1]", "not an object"),
    (b'{"tekst": "a"}', "no such column"),
    (b'{"text": 3}', "not a string"),
    (b'{"text": " "}', "empty"),
    (b'{"text": "\\ud800"}', "surrogate"),
]


class Corpus:
    """Files of every type with documents that are kept and others, and what must become of those.

    Attributes:
        folder: where the files are.
        rejected: the lines that rejected.jsonl must have, in their order.
    """

    def __init__(self, folder: Path, texts: list[str]):
        folder.mkdir()
        self.folder = folder
        self.rejected: list[dict[str, Any]] = []
        self._first, *others = texts
        self._texts = iter(others)
        (folder / "0.txt").write_text(self._first)

    def documents(self, file: str, given: list[str | None]) -> list[str | None]:
        """Returns good documents, each with a bad one after it, and notes the bad ones."""
        bad: list[tuple[str | None, str]] = [
            ("Te kort,\r\nmaar \x00 wel e\u0301cht.", "too short"),
            ("\x01\x02", "empty"),
            (ENGLISH, "not Dutch"),
            (self._first.replace(" ", "\u00a0", len(self.rejected) + 1), "near duplicate"),
            (f"{next(self._texts)} {SECRET}.", "contaminated"),
            ("de man " * 100, "few stop words"),
            (f"{self._first}\nEn nog een zin in {file}.", "near duplicate"),
            (self._first, "duplicate"),
        ]
        found: list[str | None] = []
        for text, reason in bad:
            found += [next(self._texts), text]
            label = given[len(found) % len(given)] or file.split(".")[0]
            self._reject(file, len(found), label, reason, text)
        return found

    def add_lines(self, file: str) -> bytes:
        """Returns a file of JSON Lines."""
        rows = self.documents(file, [None])
        lines = [json.dumps({"text": text, "n": n}).encode() for n, text in enumerate(rows)]
        for line, reason in BAD_LINES:
            lines += [b"", line]  # an empty line is none, but is counted
            self._reject(file, len(lines), file.split(".")[0], reason, None)
        return b"\n".join(lines)

    def add_parquet(self, file: str) -> None:
        labels = ["wiki", None, "web"]
        rows = self.documents(file, labels)
        self._reject(file, len(rows) + 1, "x", "not a string", None)
        sources = [labels[n % 3] for n in range(1, len(rows) + 1)]
        table = pa.table({"text": [*rows, None], "source": [*sources, "x"]})
        pq.write_table(table, self.folder / file, row_group_size=3)

    def _reject(self, file: str, number: int, source: str, reason: str, text: str | None) -> None:
        place = f"{self.folder / file}:{number}"
        line = {"place": place, "source": source, "reason": reason, "text": text}
        self.rejected.append(line)


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str], trained: Tokenizer
) -> Corpus:
    folder = tmp_path_factory.mktemp("rejected")
    (folder / "tokenizer.json").write_bytes(trained.json_bytes)
    (folder / "toets.txt").write_text(SECRET)
    made = Corpus(folder / "corpus", sample_texts)
    (made.folder / "a.jsonl").write_bytes(made.add_lines("a.jsonl"))
    made.add_parquet("b.parquet")
    (made.folder / "c.jsonl.gz").write_bytes(gzip.compress(made.add_lines("c.jsonl.gz")))
    (made.folder / "d.txt").write_bytes(b"goed\nslecht \xff")
    made._reject("d.txt", 2, "d.txt", "not UTF-8", None)
    (made.folder / "e.txt").write_text("Te kort.")
    made._reject("e.txt", 1, "e.txt", "too short", "Te kort.")
    return made


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 2_000)


def options(corpus: Corpus, output: Path, **changes: object) -> PreprocessOptions:
    values = {
        "source": (str(corpus.folder),),
        "tokenizer": str(corpus.folder.parent / "tokenizer.json"),
        "chunk_size": 64,
        "output_dir": output,
        "num_proc": 1,
        "on_bad_document": "skip",
        "clean": "dutch",
        "near_duplicates": True,
        "decontaminate": (corpus.folder.parent / "toets.txt",),
        "keep_rejected": True,
    }
    return PreprocessOptions(**{**values, **changes})  # type: ignore[arg-type]


def rejected_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_bytes().splitlines()]


def test_every_rejected_document_is_there_in_order(corpus: Corpus, tmp_path: Path) -> None:
    folders = [
        preprocess(options(corpus, tmp_path / str(num_proc), num_proc=num_proc), QUIET)
        for num_proc in (1, 3)
    ]
    assert rejected_lines(folders[0]) == corpus.rejected
    names = sorted(path.name for path in folders[0].iterdir())
    for name in ("rejected.jsonl", "manifest.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert names == sorted(path.name for path in folders[1].iterdir())
    manifest = verify_directory(folders[0])
    assert manifest["options"]["keep_rejected"]
    assert manifest["rejected_file"]["lines"] == len(corpus.rejected)
    assert sum(manifest["rejected"].values()) == len(corpus.rejected)


def test_near_duplicates_alone_and_bad_documents_alone(corpus: Corpus, tmp_path: Path) -> None:
    given = {"clean": "none", "near_duplicates": False, "decontaminate": ()}
    folder = preprocess(options(corpus, tmp_path, **given), QUIET)
    bad = {reason for _, reason in BAD_LINES}
    expected = [line for line in corpus.rejected if line["reason"] in bad and line["text"] is None]
    assert rejected_lines(folder) == expected


def test_nothing_beyond_the_word_limit(
    corpus: Corpus, tmp_path: Path, sample_texts: list[str]
) -> None:
    a, b, c = sample_texts[:3]
    texts = [a, "kort", b, a, "te kort", c, "nog korter", b]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    num_words = len(f"{a} {b} {a}".split())
    limited = options(corpus, tmp_path, source=(str(file),), dataset_size=str(num_words))
    found = [(line["place"], line["reason"]) for line in rejected_lines(preprocess(limited, QUIET))]
    reasons = ["too short", "duplicate", "too short"]
    places = [f"{file}:{number}" for number in (2, 4, 5)]
    assert found == list(zip(places, reasons, strict=True))


def test_no_rejected_document_gives_an_empty_file(corpus: Corpus, tmp_path: Path) -> None:
    folder = preprocess(options(corpus, tmp_path, source=("sample",), decontaminate=()), QUIET)
    assert rejected_lines(folder) == []
    assert verify_directory(folder)["rejected_file"]["lines"] == 0


def test_damage_to_the_file_is_found(corpus: Corpus, tmp_path: Path) -> None:
    file = preprocess(options(corpus, tmp_path), QUIET) / "rejected.jsonl"
    data = file.read_bytes()
    lines = data.splitlines(keepends=True)
    for changed in (
        data[:100] + bytes([data[100] ^ 4]) + data[101:],
        b"".join(lines[:-1]),
        data + lines[-1],
        None,
    ):
        file.unlink() if changed is None else file.write_bytes(changed)
        with pytest.raises(UserError) as caught:
            preprocess(PreprocessOptions(verify=file.parent), QUIET)
        assert caught.value.exit_code == ExitCode.DAMAGED
        assert caught.value.where == str(file)


def test_option_is_part_of_what_a_directory_is_made_of(corpus: Corpus, tmp_path: Path) -> None:
    folder = preprocess(options(corpus, tmp_path, keep_rejected=False), QUIET)
    assert not (folder / "rejected.jsonl").exists()
    assert "rejected_file" not in verify_directory(folder)
    with pytest.raises(UserError, match="--keep-rejected was False"):
        preprocess(options(corpus, tmp_path), QUIET)


def test_option_without_effect(corpus: Corpus, tmp_path: Path) -> None:
    nothing = {"clean": "none", "near_duplicates": False, "decontaminate": ()}
    with pytest.raises(UserError, match="nothing is rejected") as caught:
        preprocess(options(corpus, tmp_path, on_bad_document="stop", **nothing), QUIET)
    assert caught.value.exit_code == ExitCode.NO_EFFECT
    assert caught.value.where == "--keep-rejected"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lines_are_counted_once(
    suffix: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The places are right, and all of them together cost one look at each byte."""
    texts = [f"Dit is zin {n} van het bestand." if n % 9 else None for n in range(900)]
    for file in ("a", "b"):
        path = tmp_path / f"{file}.{suffix}"
        if suffix == "jsonl":
            path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        else:
            pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    counted: list[tuple[int, int, int]] = []
    count_rows = readers.count_rows

    def count(source: Source, file: int, start: int, stop: int) -> int:
        counted.append((file, start, stop))
        return count_rows(source, file, start, stop)

    monkeypatch.setattr(readers, "count_rows", count)
    given = {"clean": "none", "near_duplicates": False, "decontaminate": (), "num_proc": 1}
    folder = preprocess(options(corpus, tmp_path, source=(str(tmp_path),), **given), QUIET)
    files = [tmp_path / f"{file}.{suffix}" for file in ("a", "b")]
    places = [f"{file}:{number}" for file in files for number in range(1, 901, 9)]
    assert [line["place"] for line in rejected_lines(folder)] == places
    for number in range(2):
        ranges = [(start, stop) for file, start, stop in counted if file == number and start < stop]
        assert ranges
        assert all(a[1] <= b[0] for a, b in pairwise(ranges))
