"""Reading text: every kind of file, and every way in which it can be bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kiem.core.errors import ExitCode, UserError
from kiem.data.read.readers import list_parts, place, read_parts
from kiem.data.read.rows import Document
from kiem.data.read.sources import resolve_source, word_limit


def read(*files: Path, text_column: str = "text", part_bytes: int = 1 << 20) -> list[Document]:
    source = resolve_source(tuple(map(str, files)), None)
    parts = list_parts(source, part_bytes)
    return [row for _, row in read_parts(source, parts, text_column, "stop")]


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["Een dag\nin mei.", "Tweede tekst: één, twee € 🙂"]
    lines = "".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pq.write_table(pa.table({"text": texts, "source": ["w", "w"]}), tmp_path / "c.parquet")
    for number, text in enumerate(texts):
        (tmp_path / f"d{number}.txt").write_text(text, encoding="utf-8")
    documents = read(tmp_path)
    assert [d.text for d in documents] == texts * 4
    assert [d.source for d in documents] == ["a"] * 2 + ["b"] * 2 + ["w"] * 2 + ["d0.txt", "d1.txt"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pieces_of_any_size_give_every_row_once_and_know_its_place(
    tmp_path: Path, suffix: str
) -> None:
    texts = [f"tekst {n} " + "é" * (n * 7 % 40) for n in range(60)]
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    else:
        # A blank line after every fourth.
        ends = ["\n\n" if n % 4 == 3 else "\n" for n in range(60)]
        lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
        path.write_text("".join(map(str.__add__, lines, ends)), encoding="utf-8")
    source = resolve_source((str(path),), None)
    for part_bytes in (1, 7, 50, 64, 1000, 1 << 20):
        parts = list_parts(source, part_bytes)
        rows = list(read_parts(source, parts, "text", "stop"))
        assert [row.text for _, row in rows] == texts
        numbers = [n + 1 if suffix == ".parquet" else n + 1 + n // 4 for n in range(60)]
        places = [place(source, part, row.number) for part, row in rows]
        assert places == [f"{path}:{number}" for number in numbers]


def test_text_of_other_columns_does_not_matter(tmp_path: Path) -> None:
    lines = ['{"text": "a", "score": NaN}', '{"text": "b", "source": 3}', '{"source": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]))
    assert [(row.text, row.source) for row in read(tmp_path / "a.jsonl")] == [
        ("a", "a"),
        ("b", "a"),
    ]
    (tmp_path / "b.jsonl").write_text(lines[2])
    (only,) = read(tmp_path / "b.jsonl", text_column="source")
    assert (only.text, only.source) == ("c", "b")
    (tmp_path / "c.jsonl").write_text(json.dumps({'een "naam"\n': "d"}))
    assert read(tmp_path / "c.jsonl", text_column='een "naam"\n')[0].text == "d"


def test_carriage_returns_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"een\r\ntwee\rdrie")
    assert read(tmp_path / "a.txt")[0].text == "een\r\ntwee\rdrie"


def test_globs_and_other_columns(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"inhoud": name}) + "\n")
    assert [d.text for d in read(tmp_path / "*.jsonl", text_column="inhoud")] == ["a", "b"]


BAD_LINES = {
    "not JSON": (b'{"text": "goed"}\n{"text": ', ":2", "not JSON"),
    "a list": (b"[1]", ":1", "not a JSON object"),
    "deeply nested": (b'{"text":' + b"[" * 100_000, ":1", "not JSON"),
    "no column": (b'{"tekst": "x"}', ":1", "no column 'text'; there is 'tekst'"),
    "a number": (b'{"text": 3}', ":1", "the text is int, not a string"),
    "null": (b'{"text": null}', ":1", "the text is NoneType"),
    "empty text": (b'{"text": " \\n"}', ":1", "the text is empty"),
    "not UTF-8": (b'{"text": "goed"}\n\n{"text": "\xff"}', ":3", "not UTF-8"),
    "half a surrogate pair": (b'{"text": "a\\ud800"}', ":1", "half a surrogate pair"),
    "empty file": (b"", "", "the file is empty"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_json_lines_name_file_and_line(tmp_path: Path, case: str) -> None:
    content, place, reason = BAD_LINES[case]
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.where == f"{path}{place}"
    assert reason in caught.value.what


def test_bad_text_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"een\ntwee\n\xe9\n")
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize("keep", [0.3, 0.9])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"in{suffix}"
    texts = [f"tekst nummer {n} " * 20 for n in range(2000)]
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert str(path) in str(caught.value)


def test_parquet_column_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="not a string"):
        read(path)
    with pytest.raises(UserError, match="no column 'tekst'; there is 'text'"):
        read(path, text_column="tekst")


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (("nergens.jsonl",), ExitCode.NOT_FOUND),
        (("pyproject.toml",), ExitCode.BAD_INPUT),
        (("sample", "hub"), ExitCode.BAD_OPTION),
        (("sample", "sample"), ExitCode.BAD_OPTION),
        (("hub", "hub:a/b"), ExitCode.BAD_OPTION),
        (("hub:a",), ExitCode.BAD_OPTION),
        (("hub:a/b/c",), ExitCode.BAD_OPTION),
        (("hub:a/b:c:d:e",), ExitCode.BAD_OPTION),
    ],
)
def test_sources_that_cannot_be(source: tuple[str, ...], code: ExitCode) -> None:
    with pytest.raises(UserError) as caught:
        resolve_source(source, None)
    assert caught.value.exit_code == code


def test_unknown_hub_size_lists_the_sizes() -> None:
    with pytest.raises(UserError, match="10B, 15B") as caught:
        resolve_source(("hub",), "2B")
    assert caught.value.exit_code == ExitCode.UNKNOWN_SIZE


def test_a_file_cannot_count_twice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="named twice"):
        read(tmp_path / "a.txt", tmp_path)


def test_words_are_counted_in_the_datasets_unit() -> None:
    assert [word_limit(size) for size in (None, "50000", "10k", "1M", "5B")] == [
        None,
        50_000,
        10_000,
        1_000_000,
        5_000_000_000,
    ]
    for size in ("k", "0", "-1", "1.5k", "10K", "١٢", ""):
        with pytest.raises(UserError):
            word_limit(size)


def test_sample_is_what_it_says(sample_texts: list[str]) -> None:
    words = [len(text.split()) for text in sample_texts]
    assert len(words) == 80
    assert all(80 <= count <= 250 for count in words)
    assert sum(words) == pytest.approx(10_000, rel=0.1)
