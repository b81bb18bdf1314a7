"""kiem look: what it says of a chunk directory, against figures counted another way."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from rich.console import Console

from kiem.config import LookOptions, PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import write_json
from kiem.data.chunks import open_split, read_manifest, read_tokenizer
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.look import rejected, sample
from kiem.look.command import look, print_section, render
from kiem.look.frequent import frequent_ngrams, tokens_that_cover
from kiem.look.survey import Section, survey

ENGLISH = "The house that was on the hill is not for sale, and you can not see it from this road. "
GERMAN = "Das Haus auf dem Hügel ist nicht zu verkaufen, und die Leute im Dorf sind mit ihm froh. "


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str]) -> Path:
    """Of Dutch, some German, one document twice, and one that is rejected for its language."""
    folder = tmp_path_factory.mktemp("look")
    texts = [*sample_texts, sample_texts[0], *(f"{GERMAN * 3}{n}" for n in range(8))]
    sources = ["nederlands"] * (len(sample_texts) + 1) + ["duits"] * 8
    rows = zip(texts, sources, strict=True)
    lines = [json.dumps({"text": text, "source": source}) for text, source in rows]
    lines.append('{"text": 3}')
    (folder / "in.jsonl").write_text("\n".join(lines))
    options = PreprocessOptions(
        source=(str(folder / "in.jsonl"),),
        tokenizer="train:700",
        chunk_size=64,
        on_bad_document="skip",
        keep_rejected=True,
        output_dir=folder,
        name="made",
    )
    return preprocess(options, Console(quiet=True))


def sections(path: Path, seed: int = 1) -> dict[str, Section]:
    return {section.title: section for section in survey(path, 3, seed)}


def table(section: Section) -> dict[str, str]:
    """Returns the first two columns."""
    return {row[0]: row[1] for row in section.rows}


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_figures_are_those_of_the_text(packing: str, chunks: Path, tmp_path: Path) -> None:
    given = PreprocessOptions(
        source=(str(chunks.parent / "in.jsonl"),),
        tokenizer=str(chunks),
        chunk_size=64,
        on_bad_document="skip",
        packing=packing,  # type: ignore[arg-type]
        output_dir=tmp_path,
        name="made",
    )
    folder = preprocess(given, Console(quiet=True))
    found, manifest = sections(folder), read_manifest(folder)
    train, tokenizer = manifest["splits"]["train"], read_tokenizer(folder, manifest)
    assert table(found["Sources"]) == {
        name: f"{n:,}" for name, n in train["documents_per_source"].items()
    }
    flat = np.concatenate(open_split(folder, manifest, "train").blocks).reshape(-1)
    # Lengths: every document in one class, and their mean is that of the tokens.
    lengths = found["Lengths of documents"]
    assert sum(int(row[1].replace(",", "")) for row in lengths.rows) == train["documents"]
    mean = f"A document has {train['tokens'] / train['documents']:,.0f} tokens on average"
    assert lengths.notes[0].startswith(mean)
    # Languages: those of the sources.
    languages = {name: int(number) for name, number in table(found["Languages"]).items()}
    assert sum(languages.values()) == train["documents"]
    if packing == "concat":  # best-fit leaves a few tokens of some documents alone
        assert languages["German"] == train["documents_per_source"]["duits"]
    # Tokens, without the special ones.
    special = {*tokenizer.special_ids.values()}
    counts = Counter(token for token in flat.tolist() if token not in special)
    assert found["Most frequent tokens"].rows[0][1] == f"{counts.most_common(1)[0][1]:,}"
    used = f"{manifest['tokenizer']['num_rows'] - manifest['tokenizer']['num_unused_rows']:,}"
    assert table(found["Vocabulary"])["used by the text"].startswith(used)
    # The same first tokens: all German ones but one, and the Dutch one that is there twice.
    if packing == "concat":
        same = table(found["Duplicates"])["the same first 32 tokens"]
        assert int(same) in (train["documents_per_source"]["duits"] - n for n in (0, 1))


def test_documents_are_shown_with_their_places(chunks: Path) -> None:
    shown = sections(chunks)["Documents at random"].texts
    lines = (chunks.parent / "in.jsonl").read_text().splitlines()
    assert len(shown) == 3
    for label, text in shown:
        source, place = label.split(", ")
        row = json.loads(lines[int(place.rpartition(":")[2]) - 1])
        assert row["source"] == source
        assert text and row["text"].startswith(text[:-1])  # the last character may be cut
    assert shown == sections(chunks)["Documents at random"].texts
    assert shown != sections(chunks, seed=2)["Documents at random"].texts


def test_rejected_documents_by_reason(chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sections(chunks)["Rejected documents"]
    assert table(found) == {"not a string": "1"}
    [(label, _)] = found.texts
    assert label.startswith("not a string: in, ") and label.endswith("in.jsonl:90")
    # Of a large file, lines from all over it.
    lines = [
        {"place": f"x:{n}", "source": "x", "reason": "too short", "text": f"Zin {n}."}
        for n in range(20_000)
    ]
    (chunks / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(rejected, "_MOST_BYTES", 64_000)
    examples, is_all = rejected.read_rejected(chunks, 5, seed=1)
    numbers = [int(label.rpartition(":")[2]) for label, _ in examples]
    assert not is_all and len({*numbers}) == 5 and max(numbers) > 2_000
    (chunks / "rejected.jsonl").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        sections(chunks)


def test_of_a_large_directory_parts_are_read(chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_MOST_TOKENS", 64 * 20)
    monkeypatch.setattr(sample, "_MOST_DOCUMENTS", 10)
    manifest = read_manifest(chunks)
    sampled = sample.sample_chunks(chunks, manifest, seed=1)
    assert sampled.chunks.shape == (20, 64) and not sampled.is_all
    assert (sample.sample_chunks(chunks, manifest, seed=1).chunks == sampled.chunks).all()
    assert (sample.sample_chunks(chunks, manifest, seed=2).chunks != sampled.chunks).any()
    documents = sample.sample_documents(chunks, manifest, seed=1)
    assert len(documents.begins) == 10
    assert len(documents.lengths) == manifest["splits"]["train"]["documents"]


def test_ngrams_are_counted_and_do_not_overlap() -> None:
    generator = np.random.default_rng(0)
    chunks = generator.integers(0, 5, (50, 16)).astype(np.int32)
    special = [0]
    expected = Counter(
        tuple(row[start : start + 3])
        for row in chunks.tolist()
        for start in range(14)
        if 0 not in row[start : start + 3]
    )
    found = frequent_ngrams(chunks, 3, special, 100)
    assert found[0][1] == max(expected.values())
    assert all(expected[tuple(ids.tolist())] == count for ids, count in found)
    phrase = np.array([[1, 2, 3, 4, 5, 6, 7, 0], [1, 2, 3, 4, 5, 6, 7, 0]], np.int32)
    [(ids, count), *others] = frequent_ngrams(phrase, 4, special, 10)
    assert (ids.tolist(), count, others) == ([1, 2, 3, 4], 2, [])
    assert tokens_that_cover(np.array([1, 5, 0, 4]), 0.9) == 2


def test_the_page_stands_alone_and_shows_text_as_text(chunks: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = io.StringIO()
    (chunks / "rejected.jsonl").unlink(missing_ok=True)
    (chunks / "rejected.jsonl").write_text("")
    look(LookOptions(chunks, page), Console(file=shown, width=100))
    html = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#)', html)
    for title in sections(chunks):
        assert f"<h2>{title}</h2>" in html
        assert title in shown.getvalue()
    assert str(page) in shown.getvalue()
    bad = Section("x", ("a",), [("<script>\x07",)], texts=[("\x1b[31m", "<b>")])
    html = render("x", [bad])
    assert "&lt;script&gt;<" in html and "\x1b" not in html and "<b>" not in html


def test_the_command(sample_chunks: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run_script("-m", "kiem", "look", sample_chunks, "--output", page)
    assert done.returncode == 0, done.stderr
    assert page.exists()
    verify_directory(sample_chunks)
    done = run_script("-m", "kiem", "look", tmp_path)
    assert done.returncode == ExitCode.BAD_INPUT
    assert not tmp_path.with_suffix(".html").exists()


def test_a_narrow_terminal_cuts_names_alone() -> None:
    heads = ("source", "documents", "text", "share", "bytes/token")
    rows = [("a very long name of a source, " * 3, "12,345", "957.9 kB", "6.1%", "3.28")]
    console = Console(width=80, record=True, file=io.StringIO())
    print_section(Section("Sources", heads, rows, chart=[1.0]), console)
    lines = console.export_text().splitlines()
    assert all(head in lines[2] for head in heads), lines
    assert all(cell in lines[3] for cell in rows[0][1:]), lines
    assert lines[3].startswith("a very lo") and "…" in lines[3]


def test_directories_of_earlier_versions(chunks: Path) -> None:
    """They do not record their documents; the rest is shown."""
    manifest = read_manifest(chunks)
    del manifest["sha256"]
    for counts in manifest["splits"].values():
        del counts["document_shards"]
    manifest.pop("rejected_file")
    write_json(chunks / "manifest.json", manifest)
    found = sections(chunks)
    assert "preprocess.py --overwrite makes it again" in found["Documents"].notes[1]
    assert found["Most frequent tokens"].rows


@pytest.mark.parametrize("part", ["documents/train.arrow", "train/data-00000-of-00001.arrow"])
def test_a_damaged_directory_is_told(part: str, sample_chunks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    shutil.copytree(sample_chunks, folder)
    content = bytearray((folder / part).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff" * 400
    (folder / part).write_bytes(content)
    with pytest.raises(UserError) as caught:
        sections(folder)
    assert caught.value.exit_code == ExitCode.DAMAGED
    manifest = read_manifest(sample_chunks)
    manifest["splits"]["train"].pop("padding_tokens")
    manifest.pop("sha256")
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError):
        sections(folder)
