"""Of what was read nothing is left out unsaid: unit files, the test split, the sums of it all."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import sealed_file
from kiem.data.chunks import finish_directory, open_split, read_manifest, read_tokenizer
from kiem.data.prepare import units
from kiem.data.prepare.decisions import decide
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.split import decide_split, find_border, split_position
from kiem.data.prepare.verify import verify_directory
from kiem.data.prepare.write_splits import write_splits
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)
NUM_UNITS = 8


@pytest.fixture(scope="module")
def tokenizer_file(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_bytes(trained.json_bytes)
    return file


@pytest.fixture
def options(tmp_path: Path, tokenizer_file: Path) -> PreprocessOptions:
    return PreprocessOptions(
        source=(str(tmp_path / "in"),),
        tokenizer=str(tokenizer_file),
        chunk_size=32,
        output_dir=tmp_path / "out",
        name="made",
        num_proc=1,
    )


def write_files(folder: Path, files: dict[str, list[str]]) -> None:
    """Writes documents as .jsonl, or the only one as .txt."""
    folder.mkdir(parents=True)
    for name, texts in files.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        content = "\n".join(lines) if name.endswith(".jsonl") else texts[0]
        (folder / name).write_text(content, encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def documents(folder: Path, split: str) -> list[str]:
    """Returns the texts of a split, in order."""
    manifest = read_manifest(folder)
    tokenizer = read_tokenizer(folder, manifest)
    chunks = open_split(folder, manifest, split)
    flat = chunks.read(np.arange(chunks.num_chunks)).reshape(-1)
    starts, ends = (np.flatnonzero(flat == i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    pairs = zip(starts, ends, strict=True)
    return [tokenizer.decode(flat[start + 1 : end].tolist()) for start, end in pairs]


def told(options: PreprocessOptions) -> str:
    """Preprocesses, checks the result with --verify, and returns what people see."""
    shown = io.StringIO()
    folder = preprocess(options, Console(file=shown, width=1000))
    preprocess(PreprocessOptions(verify=folder), QUIET)
    return shown.getvalue()


# Unit files.


def flip(file: Path, _: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 8
    file.write_bytes(data)


def seal_rubbish(file: Path, _: Path) -> None:
    with sealed_file(file) as opened:
        opened.write(b"whole, but no unit")


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "removed": lambda file, _: file.unlink(),
    "emptied": lambda file, _: file.write_bytes(b""),
    "truncated": lambda file, _: file.write_bytes(file.read_bytes()[:-100]),
    "flipped": flip,
    "longer": lambda file, _: file.write_bytes(file.read_bytes() + b"x"),
    "another unit": lambda file, _: shutil.copy(file.with_name("000002.unit"), file),
    "of other work": lambda file, other: shutil.copy(other / file.name, file),
    "no unit": seal_rubbish,
}


class Interrupted(BaseException):
    """Stands for the end of the program."""


def stop_after(patch: pytest.MonkeyPatch, num_units: int) -> None:
    """Ends preprocessing after some units, as a kill does: nothing of ours runs after it."""
    finish, done = units.finish_unit, [0]

    def finish_or_stop(*arguments: Any) -> object:
        if done[0] == num_units:
            raise Interrupted
        done[0] += 1
        return finish(*arguments)

    patch.setattr("kiem.data.prepare.workers.local.finish_unit", finish_or_stop)


@dataclass(frozen=True)
class Work:
    """Preprocessing in several units.

    Attributes:
        options: of it.
        other: unit files of the same text with another --seed.
        undisturbed: the files of a run that nothing happened to.
    """

    options: PreprocessOptions
    other: Path
    undisturbed: dict[str, bytes]

    @property
    def folder(self) -> Path:
        return self.options.output_dir / ".made.unfinished"


@pytest.fixture
def work(
    options: PreprocessOptions,
    tmp_path: Path,
    sample_texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Work:
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    texts = [text[:450] for text in sample_texts[: 4 * NUM_UNITS]]
    write_files(tmp_path / "in", {f"{n}.jsonl": texts[4 * n : 4 * n + 4] for n in range(NUM_UNITS)})
    preprocess(options, QUIET)
    undisturbed = contents(options.output_dir / "made")
    shutil.rmtree(options.output_dir)
    with monkeypatch.context() as patch:
        stop_after(patch, NUM_UNITS - 1)
        with pytest.raises(Interrupted):
            preprocess(replace(options, seed=7), QUIET)
    (options.output_dir / ".made.unfinished").rename(tmp_path / "other")
    return Work(options, tmp_path / "other", undisturbed)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_bad_unit_file_is_made_again_or_named(
    work: Work, damage: Callable[[Path, Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work.options.output_dir / "made"
    with monkeypatch.context() as patch:
        stop_after(patch, NUM_UNITS - 1)
        with pytest.raises(Interrupted):
            preprocess(work.options, QUIET)
    for number in (0, 5):
        damage(work.folder / f"{number:06d}.unit", work.other)
    preprocess(work.options, QUIET)
    assert contents(made) == work.undisturbed, "they are made again"

    moments: dict[str, Any] = {"kiem.data.prepare.preprocess.decide": decide}
    if damage in (DAMAGE["removed"], DAMAGE["flipped"], DAMAGE["truncated"]):
        moments["kiem.data.prepare.preprocess.write_splits"] = write_splits
    for moment, original in moments.items():
        shutil.rmtree(made)

        def damage_first(*arguments: Any, original: Any = original) -> object:
            damage(work.folder / "000005.unit", work.other)
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(moment, damage_first)
            with pytest.raises(UserError) as caught:
                preprocess(work.options, QUIET)
        assert caught.value.exit_code == ExitCode.DAMAGED
        assert caught.value.where.endswith("000005.unit")
        assert not made.exists()
        preprocess(work.options, QUIET)
        assert contents(made) == work.undisturbed, "and the same command goes on"


# The test split of few documents.

SENTENCES = [f"Zin {n} over het weer van dag {n * 7}, en meer niet." for n in range(2400)]
PARAGRAPHS = "\n\n".join(" ".join(SENTENCES[n : n + 6]) for n in range(0, 2400, 6))


@dataclass(frozen=True)
class Cut:
    """A source of few documents.

    Attributes:
        files: its files and their documents.
        border: where the document is cut; None: no document is.
        changes: options.
        num_cut: documents that are cut.
    """

    files: dict[str, list[str]]
    border: str | None
    changes: dict[str, Any] = field(default_factory=dict)
    num_cut: int = 1


CUTS = {
    "one input.txt": Cut({"input.txt": [PARAGRAPHS]}, "paragraph"),
    "one row": Cut({"in.jsonl": [PARAGRAPHS]}, "paragraph"),
    "lines": Cut({"in.txt": ["\n".join(SENTENCES)]}, "line"),
    "one line": Cut({"in.txt": [" ".join(SENTENCES)]}, "sentence"),
    "no sentences": Cut({"in.txt": ["wel woord " * 4000]}, "word"),
    "no spaces": Cut({"in.txt": ["abcdé日👩" * 900]}, "character"),
    "Windows": Cut({"in.txt": [PARAGRAPHS.replace("\n", "\r\n")]}, "paragraph"),
    "blank ends": Cut({"in.txt": ["\n" * 900 + PARAGRAPHS + " \n" * 900]}, "paragraph"),
    "twice the same": Cut({"in.jsonl": [PARAGRAPHS] * 2}, "paragraph", num_cut=2),
    "two": Cut({"a.txt": [PARAGRAPHS], "b.txt": ["\n".join(SENTENCES)]}, "paragraph|line"),
    "large share": Cut({"in.txt": [PARAGRAPHS]}, "paragraph", {"test_split": 0.4}),
    "cleaned": Cut({"in.txt": [PARAGRAPHS]}, "paragraph", {"near_duplicates": True}),
    "best-fit": Cut({"in.txt": [PARAGRAPHS]}, "paragraph", {"packing": "best-fit"}),
    "many": Cut({"in.jsonl": SENTENCES}, None),
    "some": Cut({"in.jsonl": [" ".join(SENTENCES[n : n + 9]) for n in range(0, 90, 9)]}, None),
}


@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS)
def test_few_documents_are_cut_for_the_test_split(
    case: Cut, options: PreprocessOptions, tmp_path: Path
) -> None:
    write_files(tmp_path / "in", case.files)
    options = replace(options, **case.changes)
    shown = told(options)
    folder = options.output_dir / "made"
    manifest = read_manifest(folder)
    train, test = (documents(folder, split) for split in ("train", "test"))
    texts = sorted(text for texts in case.files.values() for text in texts)
    num_bytes = {name: counts["bytes"] for name, counts in manifest["splits"].items()}
    assert sum(num_bytes.values()) == sum(len(text.encode()) for text in texts)
    if case.border is None:
        assert "cut_for_test" not in manifest
        assert sorted(train + test) == texts
        return
    entry = manifest["cut_for_test"]
    assert entry["border"] in case.border
    assert entry["documents"] == len({*entry["places"]}) == case.num_cut
    assert f"the test split is the end of {entry['places'][0]}" in shown
    assert f"{case.num_cut} of them cut in two" in shown
    assert len(test) == case.num_cut
    if options.packing == "best-fit":  # which puts the parts of a long document anywhere
        return
    assert sorted([text for text in train if text + test[0] not in texts]) == sorted(
        text for text in texts if not text.endswith(test[0])
    )
    share = sum(len(text.strip().encode()) for text in test) / sum(num_bytes.values())
    wanted = max(options.test_split, 6 * options.chunk_size / sum(num_bytes.values()))
    assert wanted / 2 <= share <= 1.5 * wanted + 0.01
    other = replace(options, name="other", num_proc=2)
    assert contents(preprocess(other, QUIET)) == contents(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "3 tokens for training, besides 0 for testing, are less than one chunk of 32"),
        ("Een zin. Nog een zin.", r"tokens for training, .* are less than one chunk of 32"),
    ],
)
def test_too_little_text_is_said_in_numbers(
    text: str, message: str, options: PreprocessOptions, tmp_path: Path
) -> None:
    write_files(tmp_path / "in", {"in.txt": [text]})
    with pytest.raises(UserError, match=message) as caught:
        preprocess(options, QUIET)
    assert caught.value.exit_code == ExitCode.DATASET_TOO_SMALL
    assert list(options.output_dir.iterdir()) == []


@pytest.mark.parametrize("cleaning", [{}, {"clean": "dutch"}, {"near_duplicates": True}])
def test_no_vocabulary_of_test_text_or_beyond_the_limit(
    options: PreprocessOptions, tmp_path: Path, sample_texts: list[str], cleaning: dict[str, Any]
) -> None:
    files = {"a.txt": ["\n\n".join(["я" * 60, *sample_texts, "ж" * 60])], "b.txt": ["日" * 60]}
    size = len(files["a.txt"][0].split())
    if "near_duplicates" in cleaning:  # the second is like the first, and would be the one to cut
        like = [f"{PARAGRAPHS} {n}" for n in range(99)]
        like.sort(key=lambda text: split_position(text, options.seed), reverse=True)
        files, size = (
            {"0.txt": like[:1], "1.txt": like[-1:], **files},
            size + 2 * len(like[0].split()),
        )
    write_files(tmp_path / "in", files)
    told(replace(options, tokenizer="train:600", dataset_size=str(size), **cleaning))
    folder = options.output_dir / "made"
    assert documents(folder, "test")[0].endswith("ж")
    tokenizer = read_tokenizer(folder, read_manifest(folder))
    assert [tokenizer.token_id(letter) is not None for letter in "яж日"] == [True, False, False]


@given(st.text("a. \n\u0301é👩", max_size=200), st.integers(1, 300))
def test_a_border_is_between_text(text: str, num_bytes: int) -> None:
    border = find_border(text, num_bytes)
    if border is None:
        assert len(text.strip()) < 2
        return
    before, after = text[: border.place], text[border.place :]
    assert before.strip()
    assert after.strip()
    assert border.kind == "character" or (before[-1].isspace() and not after[0].isspace())


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=3), st.integers(1, 10**6)), min_size=1),
    st.sampled_from([0.002, 0.1, 0.5]),
)
def test_every_split_has_text(sizes: list[tuple[str, int]], test_share: float) -> None:
    of_text = dict(sizes)  # equal texts have equal sizes
    texts = [text for text, _ in sizes]
    num_bytes = np.array([of_text[text] for text in texts], np.int64)
    positions = np.array([split_position(text, 42) for text in texts], np.uint64)
    split = decide_split([(positions, num_bytes)], test_share, chunk_size=64)
    halves = zip(np.array_split(positions, 2), np.array_split(num_bytes, 2), strict=True)
    assert decide_split(halves, test_share, chunk_size=64) == split
    num_test = int(num_bytes[positions < np.uint64(split.limit)].sum())
    total = int(num_bytes.sum())
    if split.cut_bytes is not None:
        is_cut = positions == np.uint64(split.limit)
        assert 0 < split.cut_bytes <= int(num_bytes[is_cut].min())
        num_test += split.cut_bytes * int(is_cut.sum())
    if total >= 4 * 6 * 64:
        assert 0 < num_test < total
        assert total - num_test >= min(total // 3, 6 * 64)


# The sums.

LIMITED = {"a.jsonl": ["een twee", "drie"], "b.jsonl": ["vier vijf zes"] * 40, "c.jsonl": ["zeven"]}


@pytest.mark.parametrize(
    ("words", "num_taken", "where"),
    [("2", 1, "a.jsonl"), ("3", 2, "b.jsonl"), ("100", 34, "b.jsonl"), ("123", 42, "c.jsonl")],
)
def test_what_is_beyond_the_word_limit_is_counted(
    words: str, num_taken: int, where: str, options: PreprocessOptions, tmp_path: Path
) -> None:
    write_files(tmp_path / "in", LIMITED)
    options = replace(options, dataset_size=words, chunk_size=16, test_split=0.5)
    if num_taken < 3:
        with pytest.raises(UserError, match="less than one chunk of 16; left out"):
            preprocess(options, QUIET)
        return
    shown = told(options)
    manifest = read_manifest(options.output_dir / "made")
    per_file = manifest["documents_per_file"]
    assert [Path(name).name for name in per_file] == list(LIMITED)
    assert manifest["documents_beyond_limit"] == 43 - num_taken
    assert manifest["word_limit"]["words_taken"] <= int(words)
    assert Path(manifest["word_limit"]["reached_in"]).name == where
    assert f"{43 - num_taken} beyond the word limit" in shown
    assert f"the limit of {words} words was reached in " in shown


def change_sum(manifest: dict[str, Any], *keys: str, by: int = 1) -> None:
    for key in keys[:-1]:
        manifest = manifest[key]
    manifest[keys[-1]] += by


SUMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "documents read": lambda m: change_sum(m, "documents_read"),
    "beyond the limit": lambda m: change_sum(m, "documents_beyond_limit"),
    "words taken": lambda m: change_sum(m, "word_limit", "words_taken", by=-100),
    "limit": lambda m: change_sum(m, "word_limit", "words", by=1000),
    "rejected": lambda m: m["rejected"].update(other=1),
    "cut": lambda m: m.update(cut_for_test={"documents": 1}),
    "a file": lambda m: m["documents_per_file"].popitem(),
    "other files": lambda m: m.update(
        documents_per_file={f"x{name}": n for name, n in m["documents_per_file"].items()}
    ),
    "files not read": lambda m: change_sum(m, "word_limit", "files_not_read"),
    "bytes": lambda m: change_sum(m, "splits", "train", "bytes"),
    "documents": lambda m: change_sum(m, "splits", "test", "documents"),
    "tokens": lambda m: change_sum(m, "splits", "train", "tokens", by=-1),
    "padding": lambda m: change_sum(m, "splits", "test", "padding_tokens"),
    "chunks": lambda m: change_sum(m, "splits", "test", "chunks", by=-1),
}


@pytest.mark.parametrize("change", SUMS.values(), ids=SUMS)
def test_a_sum_that_is_wrong_is_found(
    change: Callable[[dict[str, Any]], object], options: PreprocessOptions, tmp_path: Path
) -> None:
    write_files(tmp_path / "in", LIMITED)
    folder = preprocess(replace(options, dataset_size="100", chunk_size=16), QUIET)
    manifest = verify_directory(folder)
    change(manifest)
    finish_directory(folder, manifest)
    with pytest.raises(UserError) as caught:
        preprocess(PreprocessOptions(verify=folder), QUIET)
    assert caught.value.exit_code == ExitCode.DAMAGED
