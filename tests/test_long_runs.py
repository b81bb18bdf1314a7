"""Odd text costs no more than its length: long runs of one character, no space, very many files.

No time is measured: what is counted is work, and what is compared are outcomes.
"""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.data.chunks import read_manifest
from kiem.data.clean.cleaner import normalize
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.units import list_file_parts, plan_units
from kiem.data.read.sources import resolve_source
from kiem.tokenizer.encoding import Encoder, fast_path
from kiem.tokenizer.tokenizer import Tokenizer
from kiem.tokenizer.train import train_tokenizer

LONGEST_ENTRY = 2048  # as train_tokenizer says
LENGTH = 20_000
LETTERS = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=LENGTH))
RUNS = {
    "dashes": "-" * LENGTH,
    "NULs": "\0" * LENGTH,
    "one letter": "a" * LENGTH,
    "letters": LETTERS,
    "marks": "e" + "\u0301\u0323" * (LENGTH // 2),
    "emoji": "👩‍👩‍👧‍👦" * (LENGTH // 7),
    "spaces": "a" + " " * LENGTH + "b",
    "other spaces": "a" + "\u00a0\u2003" * (LENGTH // 2) + "b",
    "blank lines": "a" + "\n" * LENGTH + "b",
    "carriage returns": "a" + "\r" * LENGTH + "b",
    "tabs": "a" + "\t" * LENGTH + "b",
    "digits": "7" * LENGTH,
    "less-than signs": "<" * LENGTH,
    "a long line": "een woord. " * (LENGTH // 11),
}
# Of these the trainer would make longer and longer entries; others it cuts or has no letters of.
GROWING = ("dashes", "one letter", "spaces", "blank lines", "tabs", "less-than signs")


@pytest.mark.parametrize("name", GROWING)
def test_no_entry_of_a_vocabulary_is_longer_for_a_longer_run(
    name: str, sample_texts: list[str]
) -> None:
    """Training takes time by the square of the longest piece, which this shows."""
    run = RUNS[name] * 3
    vocabulary = train_tokenizer([*sample_texts[:20], run], 800).vocabulary
    assert LONGEST_ENTRY // 4 < max(map(len, vocabulary)) <= LONGEST_ENTRY


def test_the_longest_runs_that_are_not_cut_train_as_they_are(sample_texts: list[str]) -> None:
    """A run up to the longest piece counts as one, and what is beyond it as another."""
    once, twice, more = (
        train_tokenizer([*sample_texts, "=" * length, "=" * (2 * LONGEST_ENTRY - length)], 700)
        for length in (LONGEST_ENTRY, 2 * LONGEST_ENTRY, LONGEST_ENTRY - 1)
    )
    assert once.json_bytes == twice.json_bytes
    assert once.json_bytes != more.json_bytes


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_run_is_encoded_exactly(run: str, trained: Tokenizer) -> None:
    encoded = Encoder(trained, fast_path(trained, "auto")).encode([run], lambda _: "")
    assert encoded.ids.tolist() == trained.encode(run)
    assert trained.decode(encoded.ids.tolist()) == run


@pytest.mark.parametrize("filters", ["none", "dutch"])
def test_every_odd_document_is_accounted_for(
    filters: str, trained: Tokenizer, sample_texts: list[str], tmp_path: Path
) -> None:
    texts = [*sample_texts, *RUNS.values(), *(f"{sample_texts[0]} {run}" for run in RUNS.values())]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    options = PreprocessOptions(
        source=(str(tmp_path / "in.jsonl"),),
        tokenizer=str(tmp_path / "tokenizer.json"),
        chunk_size=64,
        output_dir=tmp_path / "out",
        clean=filters,
        near_duplicates=filters != "none",
        replace_personal_data=("email", "iban", "bsn", "phone"),
        num_proc=1,
    )
    folder = preprocess(options, Console(quiet=True))
    preprocess(PreprocessOptions(verify=folder), Console(quiet=True))
    manifest = read_manifest(folder)
    assert manifest["documents_read"] == len(texts)
    num_bytes = sum(counts["bytes"] for counts in manifest["splits"].values())
    if filters == "none":
        assert num_bytes == sum(len(text.encode()) for text in texts)
    else:
        assert sum(manifest["rejected"].values()) >= len(RUNS)


@given(st.text("ae\u0301\u0323\u0345\u0591\u1100\u1161\u11a8\u3099か👩-", max_size=700))
def test_many_marks_are_mended_as_few_are(text: str) -> None:
    marks = text + "\u0323\u0301" * 60 + text
    assert normalize(marks) == unicodedata.normalize("NFC", marks)
    assert normalize(normalize(marks)) == normalize(marks)


def test_planning_is_linear(tmp_path: Path) -> None:
    """So many calls does a plan take, Python's and C's: each file takes as many as others did."""
    num_calls: Counter[int] = Counter()
    for num_files in (100, 200, 400):
        folder = tmp_path / str(num_files)
        folder.mkdir()
        for number in range(num_files):
            (folder / f"{number}.txt").write_text("tekst")
        source = resolve_source((str(folder),), None)

        def count(*_: object, num_files: int = num_files) -> None:
            num_calls[num_files] += 1

        sys.setprofile(count)
        try:
            parts = (list_file_parts(source, number) for number in range(num_files))
            plan = plan_units(source, [*chain.from_iterable(parts)])
        finally:
            sys.setprofile(None)
        assert sum(len(unit.parts) for unit in plan) == num_files
    assert num_calls[400] - num_calls[200] <= 2.1 * (num_calls[200] - num_calls[100])
