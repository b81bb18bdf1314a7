"""Every format of text: the table of docs/formats.md, folders, standard input; nothing is lost."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL_UNITS_PROGRAM, run_script
from format_cases import AB, CASES, END, STORY, A, B, Case, lines, parquet, stream
from rich.console import Console

from kiem.config import EvaluationOptions, PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import read_manifest
from kiem.data.clean.contamination import read_evaluation
from kiem.data.prepare.preprocess import preprocess
from kiem.data.read import formats
from kiem.data.read.find_files import show_counts
from kiem.data.read.readers import check_effects, list_parts, place, read_parts
from kiem.data.read.sources import Source, resolve_source
from kiem.evaluation.command import evaluation_documents
from kiem.evaluation.minimal_pairs import read_suite
from kiem.inference.generate import read_prompts
from kiem.tokenizer.tokenizer import Tokenizer


def read(case: Case, path: Path, on_bad: Any, part_bytes: int) -> tuple[Source, list[Any]]:
    source = resolve_source((str(path),), None, document_separator=case.separator)
    check_effects(source, case.column)
    parts = list_parts(source, part_bytes)
    return source, list(read_parts(source, parts, case.column, on_bad))


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_of_a_file(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / case.file
    path.write_bytes(case.content)
    for part_bytes in (1 << 20, 7, 1):
        if case.message is not None:
            with pytest.raises(UserError) as caught:
                read(case, path, "stop", part_bytes)
            message = f"{caught.value.where}: {caught.value.what}"
            assert message.startswith(case.message.format(path=path))
            assert "\n" not in message
            assert caught.value.fix
            if not case.documents:
                continue
        source, found = read(case, path, "skip", part_bytes)
        good = [(part, row) for part, row in found if row.problem is None]
        assert [row.text for _, row in good] == list(case.documents)
        if case.places is not None:
            places = [place(source, part, row.number) for part, row in good]
            assert places == [f"{path}:{number}" for number in case.places]
        assert (len(found) > len(good)) == (case.message is not None)


def test_texts_are_cut_alike_in_pieces_of_any_size(tmp_path: Path) -> None:
    """Compared with the whole file cut by a regular expression."""
    chance = random.Random(0)
    path = tmp_path / "a.txt"
    kinds = {END: rf"^[ \t]*{re.escape(END)}[ \t]*$", "blank-lines": r"^\s*$", "every-line": "$"}
    for _ in range(100):
        parts = [chance.choice(["a", "é b", "", " ", END, f" {END}", "x" * 30]) for _ in range(9)]
        path.write_text("\n".join([*parts, END, "b", "", "c"][chance.randrange(9) :]))
        for separator, expression in kinds.items():
            cut = re.split(expression, path.read_text(), flags=re.MULTILINE)
            # White space before the first line of a text, and line ends after it, are no text.
            texts = [re.sub(r"^(\s*\n)+", "", text).rstrip("\n") for text in cut if text.strip()]
            for part_bytes in (1, 3, 17, 1 << 20):
                _, rows = read(Case("", b"", separator=separator), path, "stop", part_bytes)
                assert [row.text for _, row in rows] == texts


TREE = {
    "b.txt": b"b",
    "C.JSONL": lines("c"),
    "a/nl.jsonl.gz": gzip.compress(lines("a")),
    "a/deep/x.TXT": b"x",
    "a.parquet/part-0.arrow": stream({"text": ["p"]}),
    "a.parquet/_SUCCESS": b"",
    "AA/wiki_00": AB,
    "notes.docx": b"PK",
    "a/paper.PDF": b"%PDF",
    "a/old.pdf": b"%PDF",
    "a/rest.tar.gz": b"",
    "dataset_info.json": b"{}",
    ".hidden.txt": b"no",
    "._b.txt": b"no",
    ".git/config.txt": b"no",
    "__MACOSX/._b.txt": b"no",
}
CHUNK_DIRECTORY = ["manifest.json", "tokenizer.json", "train/rejected.jsonl"]
READ = [
    *("AA/wiki_00", "C.JSONL", "a/deep/x.TXT", "a/nl.jsonl.gz", "a.parquet/part-0.arrow", "b.txt")
]
NOT_READ = "6 files (.pdf 2, .docx 1, .tar.gz 1, dataset_info.json 1, without suffix 1)"


def make_tree(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(TREE.get(name, b"{}"))
    return folder


@pytest.mark.parametrize("pattern", ["", "/", "/*", "/**", "/**/*"])
def test_folders_are_read_whole_in_one_order(pattern: str, tmp_path: Path) -> None:
    for number, names in enumerate([list(TREE), list(TREE)[::-1]]):
        tree = make_tree(tmp_path / str(number), names)
        source = resolve_source((f"{tree}{pattern}",), None)
        assert [str(file.path.relative_to(tree)) for file in source.files] == READ
        assert show_counts(source.not_read) == NOT_READ
        rows = [row.text for _, row in read_parts(source, list_parts(source, 9), "text", "stop")]
        assert rows == [A, B, "c", "x", "a", "p", "b"]


# What is made in the folder, what is read of it then, and what is not; or the message.
ODD_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str] | str, str]] = {
    "link to the folder above": (lambda f: (f / "a" / "up").symlink_to(f), ["a/a.txt"], ""),
    "link to itself": (
        lambda f: (f / "b").symlink_to("b"), ["a/a.txt"], "1 file (without suffix 1)"
    ),
    "two links to a folder": (
        lambda f: [(f / name).symlink_to("a") for name in ("b", "c")], ["a/a.txt"], ""
    ),
    "link to a folder elsewhere": (
        lambda f: (f / "b").symlink_to(make_tree(f.parent / "x", ["b.txt"])),
        ["a/a.txt", "b/b.txt"], "",
    ),
    "link to nothing": (
        lambda f: (f / "b.doc").symlink_to("gone"), ["a/a.txt"], "1 file (.doc 1)"
    ),
    "FIFO": (lambda f: os.mkfifo(f / "pipe"), ["a/a.txt"], "1 file (without suffix 1)"),
    "control characters in a suffix": (
        lambda f: (f / "a.\x1b").touch(), ["a/a.txt"], "1 file (without suffix 1)"
    ),
    "named FIFO.txt": (
        lambda f: os.mkfifo(f / "FIFO.txt"),
        "{folder}/FIFO.txt: is not a regular file, nor a link to one", "",
    ),
    "link to a file": (
        lambda f: (f / "b.txt").symlink_to("a/a.txt"), "--source: named twice: {folder}/a/a.txt", ""
    ),
    "chunk directory": (
        lambda f: make_tree(f / "made", CHUNK_DIRECTORY), ["a/a.txt"],
        "3 files (in chunk directories 3)",
    ),
    "manifest of something else": (
        lambda f: make_tree(f / "b", CHUNK_DIRECTORY[:1]), ["a/a.txt", "b/manifest.json"], ""
    ),
    "nothing that can be read": (
        lambda f: (f / "a" / "a.txt").rename(f / "a" / "a.pdf"),
        "--source {folder}: has no file that can be read, but 1 file (.pdf 1)", "",
    ),
    "nothing": (
        lambda f: (f / "a" / "a.txt").unlink(),
        "--source {folder}: has no file that can be read", "",
    ),
    "something hidden": (
        lambda f: (f / "a").rename(f / ".a"), "--source {folder}: has no file that can be read", ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_FOLDERS)
def test_odd_folders(name: str, tmp_path: Path) -> None:
    make, expected, not_read = ODD_FOLDERS[name]
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "a.txt").write_text("a")
    make(folder)
    if isinstance(expected, str):
        with pytest.raises(UserError) as caught:
            resolve_source((str(folder),), None)
        message = f"{caught.value.where}: {caught.value.what}"
        assert message == expected.format(folder=folder)
    else:
        source = resolve_source((str(folder),), None)
        assert [str(file.path.relative_to(folder)) for file in source.files] == expected
        assert (show_counts(source.not_read) if source.not_read else "") == not_read


@pytest.mark.parametrize("kind", ["lines", "text", "array"])
def test_standard_input(
    kind: str, sample_texts: list[str], trained: Tokenizer, tmp_path: Path
) -> None:
    """Read by two processes in several units; the manifest knows what was read."""
    text, more = {
        "lines": (lines(*sample_texts).decode(), ()),
        "text": (f"\n{END}\n".join(sample_texts), ("--document-separator", END)),
        "array": (
            json.dumps([{"a": {"b": text}} for text in sample_texts]),
            ("--text-column", "a.b"),
        ),
    }[kind]
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    command = ["-c", SMALL_UNITS_PROGRAM, "--source", "-", *more, "--num-proc", "2"]
    command += ["--tokenizer", str(tmp_path), "--output-dir", str(tmp_path)]
    done = run_script(*command, stdin=text)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "chunked_stdin")
    assert manifest["documents_read"] == len(sample_texts)
    assert [*manifest["source"]["sha256"]] == ["-"]
    if kind == "text":
        assert "made of the same text" in run_script(*command, stdin=text).stdout
        assert "--source was other text" in run_script(*command, stdin=text + "x").stderr


PROMPTS = {
    "a.txt": b"een\r\n\n twee \n",
    "a.TXT.gz": gzip.compress(b"een\n twee \n"),
    "a.jsonl": b'{"prompt": "een"}\n\n{"prompt": " twee "}',
    "a.json": b'["een", {"prompt": " twee "}]',
    "a.csv": b"id,prompt\n1,een\n2, twee \n",
    "a.parquet": parquet({"prompt": ["een", " twee "]}),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_in_every_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PROMPTS[name])
    assert read_prompts(None, tmp_path / name) == ["een", " twee "]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.txt", b"een\n\xff\n", ":2: not UTF-8"),
        ("a.txt", b"\n \n", ": the file has no prompts"),
        ("a.csv", b"id,text\n", ":1: no column 'prompt'; there is 'id', 'text'"),
        ("a.parquet", parquet({"text": ["a"]}), ": no column 'prompt'; there is 'text'"),
        ("a.docx", b"PK", ": unknown type of file"),
    ],
)
def test_bad_prompts(name: str, content: bytes, place: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(None, tmp_path / name)
    assert f"{caught.value.where}: {caught.value.what}" == f"{tmp_path / name}{place}"
    assert "prompt a line" in caught.value.fix


PAIRS = [{"sentence_good": "Wie belt hij?", "sentence_bad": "Wie hij belt?", "UID": "wh"}] * 2
ROWS = [list(PAIRS[0]), *(list(pair.values()) for pair in PAIRS)]
SUITES = {
    "a.jsonl.gz": gzip.compress("\n".join(map(json.dumps, PAIRS)).encode()),
    "a.json": json.dumps(PAIRS).encode(),
    "a.csv": "\n".join(map(",".join, ROWS)).encode(),
    "a.tsv": "\n".join(map("\t".join, ROWS)).encode(),
    "a.parquet": parquet({name: [pair[name] for pair in PAIRS] for name in PAIRS[0]}),
    "a.arrow": stream({name: [pair[name] for pair in PAIRS] for name in PAIRS[0]}),
}


@pytest.mark.parametrize("name", SUITES)
def test_suites_in_every_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(SUITES[name])
    pairs = read_suite((str(tmp_path),))
    assert [vars(pair) for pair in pairs] == [
        {"good": "Wie belt hij?", "bad": "Wie hij belt?", "phenomenon": "wh"}
    ] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"sentence_good,sentence_bad\na,b\na,b,c\n", ":3: has 3 fields"),
        ("a.json", b"[3]", ":1: not a JSON object"),
        ("a.json", b"[", ":1: damaged JSON"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-4], ": damaged gzip"),
        ("a.parquet", parquet({"text": ["a"]}), ":1: no two sentences that differ"),
        ("a.txt", b"a", ": has no columns"),
    ],
)
def test_bad_suites(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_suite((str(tmp_path / name),))
    place = f"{caught.value.where}: {caught.value.what}"
    assert place.startswith(f"{tmp_path / name}{message}")


def test_evaluation_files_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(STORY)
    (tmp_path / "b.pdf").touch()
    options = EvaluationOptions("", data=(str(tmp_path),), document_separator=END)
    console = Console(file=io.StringIO())
    assert [document.text for document in evaluation_documents(options, console)] == [A, B]
    assert "--data: not read: 1 file (.pdf 1)" in console.file.getvalue()
    (tmp_path / "c.json").write_text(json.dumps(["een twee drie vier vijf zes zeven acht"]))
    assert read_evaluation([tmp_path / "*.json"], "text").hashes.keys() == {8}


# What is given, and what the error says beside how little there is.
TOO_LITTLE: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "all rejected": (
        b'{"a": 1}\n' * 9, {"on_bad_document": "skip"}, "; left out: 9 no such column"
    ),
    "beyond the limit": (
        lines("een twee drie"), {"dataset_size": "2"}, "; left out: 1 beyond --dataset-size"
    ),
    "both": (
        b"x\n" + lines("een twee drie"), {"dataset_size": "2", "on_bad_document": "skip"},
        "; left out: 1 beyond --dataset-size, 1 not JSON",
    ),
    "nothing": (lines("een twee drie"), {}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LITTLE)
@pytest.mark.parametrize("is_trained", [True, False])
def test_too_little_text_says_what_was_left_out(
    name: str, is_trained: bool, trained: Tokenizer, tmp_path: Path
) -> None:
    content, more, left_out = TOO_LITTLE[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    tokenizer = str(tmp_path / "tokenizer.json") if is_trained else "train:600"
    options = PreprocessOptions(
        source=(str(tmp_path / "a.jsonl"),), tokenizer=tokenizer, output_dir=tmp_path, **more
    )
    with pytest.raises(UserError) as caught:
        preprocess(options, Console(quiet=True))
    assert caught.value.exit_code == ExitCode.DATASET_TOO_SMALL
    enough = "of 600 entries" if not is_trained else "less than one chunk of 1024"
    assert caught.value.what.endswith(enough + left_out)


def test_the_page_has_every_format() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for suffix in (*formats.KINDS, *formats.COMPRESSIONS):
        assert f"`{suffix}`" in page
