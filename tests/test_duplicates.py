"""Equal and similar documents, and text shared with evaluation files, also from end to end."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import open_split, read_manifest, read_tokenizer
from kiem.data.clean.contamination import read_evaluation
from kiem.data.clean.near_duplicates import SHINGLE_WORDS, band_keys
from kiem.data.clean.ngrams import WordHashes, lowercase_words
from kiem.data.prepare import decisions
from kiem.data.prepare.preprocess import preprocess


def words(number: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnoprstuvw", k=7)) for _ in range(number)]


def jaccard(first: str, second: str) -> float:
    shingles = []
    for text in (first, second):
        found = lowercase_words(text)
        last = len(found) - SHINGLE_WORDS + 1
        shingles.append({tuple(found[n : n + SHINGLE_WORDS]) for n in range(last)})
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_near_duplicates_are_found_as_often_as_the_formula_says(similarity: float) -> None:
    """Pairs that share their beginning: of 200 + d words, 200 in common."""
    num_pairs, shared = 400, 200
    num_other = round((shared - 4) * (1 - similarity) / (2 * similarity))
    texts = []
    for seed in range(num_pairs):
        common = words(shared, 3 * seed)
        texts += [" ".join(common + words(num_other, 3 * seed + n)) for n in (1, 2)]
    real = jaccard(texts[0], texts[1])
    assert real == pytest.approx(similarity, abs=0.01)
    keys = band_keys(texts, WordHashes())
    num_found = int((keys[::2] == keys[1::2]).any(axis=1).sum())
    expected = 1 - (1 - real**8) ** 14
    deviation = math.sqrt(num_pairs * expected * (1 - expected))
    assert abs(num_found - num_pairs * expected) <= 4 * deviation + 1
    assert np.array_equal(keys, band_keys(texts, WordHashes()))
    assert np.array_equal(keys[5:7], band_keys(texts[5:7], WordHashes()))


def test_documents_shorter_than_a_shingle_are_alike_when_equal() -> None:
    keys = band_keys(["een twee", "Een, twee!", "een drie", "…", "?"], WordHashes())
    assert np.array_equal(keys[0], keys[1])
    assert len({tuple(row) for row in keys}) == 4


def evaluation_file(tmp_path: Path, *texts: str) -> Path:
    file = tmp_path / "evaluation.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_thirteen_consecutive_words_are_contamination(tmp_path: Path) -> None:
    long, eight, twelve, seven = (words(n, n) for n in (40, 8, 12, 7))
    given = (" ".join(part) for part in (long, eight, twelve, seven))
    evaluation = read_evaluation([evaluation_file(tmp_path, *given)], "text")
    before, after = " ".join(words(30, 1)), " ".join(words(30, 2))

    def is_in(found: list[str], between: str = " ") -> bool:
        return evaluation.overlaps(f"{before} {between.join(found)} {after}", WordHashes())

    assert is_in(long)
    for start in (0, 10, 27):
        assert is_in(long[start : start + 13])
        assert not is_in(long[start : start + 12])
    assert is_in([word.upper() for word in long[5:18]], between=", ")
    assert is_in(long[5:18], between='."\n')
    assert not is_in([*long[:12], "ander", *long[12:24]])
    assert is_in(eight)
    assert not is_in(eight[:7])
    assert is_in(twelve)
    assert not is_in(twelve[1:])
    assert not is_in(seven)
    assert evaluation.num_ignored == 1
    assert not evaluation.overlaps("", WordHashes())


def test_bad_row_of_an_evaluation_file_has_a_fix_that_helps(tmp_path: Path) -> None:
    file = evaluation_file(tmp_path, " ".join(words(20, 1)))
    file.write_text(file.read_text() + "kapot\n")
    with pytest.raises(UserError, match="not JSON") as caught:
        read_evaluation([file], "text")
    assert str(caught.value.where).endswith("evaluation.jsonl:2")
    assert "--on-bad-document" not in caught.value.fix
    assert "--decontaminate" in caught.value.fix


def documents(sample_texts: list[str]) -> list[str]:
    """The texts of the sample that are long enough to pass the filters."""
    return [text for text in sample_texts if len(text.split()) >= 60]


def options(tmp_path: Path, texts: list[str], **changes: object) -> PreprocessOptions:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = {
        "source": (str(file),),
        "tokenizer": "train:600",
        "chunk_size": 64,
        "output_dir": tmp_path / "out",
        "clean": "dutch",
    }
    return PreprocessOptions(**{**given, **changes})  # type: ignore[arg-type]


def chunked_texts(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    found = []
    for split in ("train", "test"):
        chunks = open_split(folder, manifest, split)
        ids = chunks.read(np.arange(chunks.num_chunks)).reshape(-1)
        starts = np.flatnonzero(ids == tokenizer.bos_id)
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        found += [
            tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in zip(starts, ends, strict=True)
        ]
    return found


def test_everything_that_cleaning_leaves_out_is_counted_and_gone(
    tmp_path: Path, sample_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    good = documents(sample_texts)
    assert len(good) > 20
    evaluation = evaluation_file(tmp_path, good[3], "te kort")
    changed = good[5].split(" ")
    changed[-1] = "anders."
    english = "the cat and the dog went to the house of that man with this hat " * 6
    dirty = good[7].replace(" ", "\x00 ", 3).replace(". ", ".\r\n", 1)
    normalized = good[7].replace(". ", ".\n", 1)
    texts = [*good[:7], dirty, *good[8:], good[0], " ".join(changed), english, "te kort", "\x00 "]
    console = Console(stderr=True, width=200)
    given = options(tmp_path, texts, near_duplicates=True, decontaminate=(evaluation,))
    folder = preprocess(given, console)
    manifest = read_manifest(folder)
    assert manifest["rejected"] == {
        "contaminated": 1,
        "duplicate": 1,
        "empty": 1,
        "near duplicate": 1,
        "not Dutch": 1,
        "too short": 1,
    }
    num_kept = sum(split["documents"] for split in manifest["splits"].values())
    assert manifest["documents_read"] == len(texts) == num_kept + 6
    expected = [*good[:3], *good[4:7], normalized, *good[8:]]
    assert sorted(chunked_texts(folder)) == sorted(expected)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert not {"\x00", "\r"} & set(vocabulary)
    assert capsys.readouterr().err.count("of fewer than 8 words, not looked for: 1") == 1


def test_the_first_of_equal_documents_is_kept(tmp_path: Path, sample_texts: list[str]) -> None:
    good = documents(sample_texts)[:20]
    folder = preprocess(options(tmp_path, [*good, *good[::-1], good[4]]), Console(quiet=True))
    assert read_manifest(folder)["rejected"] == {"duplicate": 21}
    once = preprocess(options(tmp_path, good, name="once"), Console(quiet=True))
    assert chunked_texts(folder) == chunked_texts(once)


@pytest.mark.parametrize("sorted_at_once", [decisions.SORTED_AT_ONCE, 7])
def test_a_document_is_a_near_duplicate_of_any_earlier_one(
    sorted_at_once: int,
    tmp_path: Path,
    sample_texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of one that is a near duplicate itself, and for any part of the keys that is sorted."""
    draw = random.Random(5)
    texts = documents(sample_texts)[:12]
    while len(texts) < 60:
        changed = draw.choice(texts).split(" ")
        for _ in range(draw.choice((0, 1, 3, 10))):
            changed[draw.randrange(len(changed))] = "anders"
        texts.append(" ".join(changed))
    monkeypatch.setattr(decisions, "SORTED_AT_ONCE", sorted_at_once)
    given = options(tmp_path, texts, near_duplicates=True, keep_rejected=True)
    rejected = preprocess(given, Console(quiet=True)) / "rejected.jsonl"
    found = [json.loads(line) for line in rejected.read_bytes().splitlines()]
    expected, seen = [], set()
    for number, (text, keys) in enumerate(zip(texts, band_keys(texts, WordHashes()), strict=True)):
        pairs = {*enumerate(keys.tolist())}
        if text in texts[:number]:
            expected.append((text, "duplicate"))
        elif pairs & seen:
            expected.append((text, "near duplicate"))
        seen |= pairs
    assert [(line["text"], line["reason"]) for line in found] == expected
    assert {reason for _, reason in expected} == {"duplicate", "near duplicate"}


def test_near_duplicates_need_rensa(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['rensa'] = None\n"
        "sys.argv = ['preprocess.py', '--source', 'sample', '--tokenizer', 'train:600',"
        f" '--near-duplicates', '--output-dir', {str(tmp_path)!r}]\n"
        "runpy.run_path('preprocess.py', run_name='__main__')"
    )
    done = run_script("-c", code)
    assert done.returncode == ExitCode.BAD_OPTION
    assert "pip install rensa" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
