"""Malformed and hostile input, end to end: every row is kept or counted, every error named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bad_input_cases import AB, CASES, COLUMN, MANY, ODD_TEXTS, Case, line, parquet
from conftest import ROOT
from format_cases import feather, stream, zstd
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import open_split, read_manifest, read_tokenizer
from kiem.data.prepare import units
from kiem.data.prepare.preprocess import preprocess
from kiem.data.read.readers import list_parts, read_parts
from kiem.data.read.sources import count_words, resolve_source
from kiem.tokenizer.encoding import Encoder, fast_path
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)
# Beside the file of each case, so that there is something to train and to test on.
GOOD = [f"Dit is een goed document, het {n}e." for n in range(3)]
LETTER_OF_SPACES = "\u2581"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, trained: Tokenizer) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    file.write_bytes(trained.json_bytes)
    return file


class Run:
    """preprocess() on a folder with one bad file, with units of a given size."""

    def __init__(self, folder: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch):
        self.source = folder / "source"
        self.output = folder / "out"
        self.source.mkdir()
        (self.source / "0.jsonl").write_bytes(b"".join(map(line, GOOD)))
        self._tokenizer_file = tokenizer_file
        self._monkeypatch = monkeypatch

    def __call__(self, on_bad: str, unit_bytes: int) -> dict[str, object]:
        self._monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
        shutil.rmtree(self.output, ignore_errors=True)
        options = PreprocessOptions(
            source=(str(self.source),),
            tokenizer=str(self._tokenizer_file),
            chunk_size=16,
            output_dir=self.output,
            name="made",
            num_proc=1,
            on_bad_document=on_bad,  # type: ignore[arg-type]
        )
        try:
            return read_manifest(preprocess(options, QUIET))
        except UserError:
            left = list(self.output.iterdir()) if self.output.exists() else []
            assert not left, "something is left of a run that was refused"
            raise

    def documents(self) -> Counter[str]:
        """Returns the documents in the chunk directory, a cut one as it was."""
        folder = self.output / "made"
        manifest = read_manifest(folder)
        tokenizer = read_tokenizer(folder, manifest)
        found: list[str] = []
        for split in ("test", "train"):
            chunks = open_split(folder, manifest, split)
            ids = chunks.read(np.arange(chunks.num_chunks)).reshape(-1)
            starts = np.flatnonzero(ids == tokenizer.bos_id)
            ends = np.flatnonzero(ids == tokenizer.eos_id)
            pairs = zip(starts, ends, strict=True)
            texts = [tokenizer.decode(ids[start + 1 : end].tolist()) for start, end in pairs]
            if split == "train" and "cut_for_test" in manifest:  # its parts are the last ones
                texts[-1] += found.pop()
            found += texts
        return Counter(found)


@pytest.fixture
def run(tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, tokenizer_file, monkeypatch)


def unit_sizes(path: Path) -> list[int]:
    """Everything in one unit, and units of which several begin in one line."""
    if path.suffix not in (".jsonl", ".parquet") or not path.is_file() or path.is_symlink():
        return [units.UNIT_BYTES, 64]
    return [units.UNIT_BYTES, max(64, path.stat().st_size // 4), max(31, path.stat().st_size // 9)]


def decoded(text: str) -> str:
    """A tokenizer of Gemma's kind writes spaces as U+2581, so that one comes back as a space."""
    return text.replace(LETTER_OF_SPACES, " ")


@pytest.mark.parametrize("name", CASES)
def test_every_row_is_kept_or_counted(name: str, run: Run) -> None:
    case: Case = CASES[name]
    path = run.source / case.file
    if isinstance(case.content, bytes):
        path.write_bytes(case.content)
    else:
        case.content(path)
    for unit_bytes in unit_sizes(path):
        if case.message is not None:
            for on_bad in ("stop", "skip") if case.always else ("stop",):
                with pytest.raises(UserError) as caught:
                    run(on_bad, unit_bytes)
                assert caught.value.exit_code == ExitCode.BAD_INPUT
                assert caught.value.fix
                message = f"{caught.value.where}: {caught.value.what}"
                check_message(message, case.message.format(path=str(path)))
        for on_bad in () if case.always else ("skip",) if case.message else ("stop", "skip"):
            manifest = run(on_bad, unit_bytes)
            assert manifest["rejected"] == case.rejected
            num_rejected = sum(case.rejected.values())
            assert manifest["documents_read"] == len(GOOD) + len(case.documents) + num_rejected
            assert run.documents() == Counter(map(decoded, [*GOOD, *case.documents]))


def check_message(message: str, expected: str) -> None:
    assert "\n" not in message
    parts = [part for part in expected.split("...") if part]
    assert message.startswith(parts[0])
    assert message == expected or ("..." in expected and all(part in message for part in parts))


def test_there_are_enough_cases_and_no_two_are_the_same() -> None:
    assert len(CASES) >= 60
    contents = {(case.file, case.content) for case in CASES.values()}
    assert len(contents) == len(CASES)


def test_odd_texts_come_back_from_gemmas_ids(gemma: Tokenizer) -> None:
    texts = [text for case in CASES.values() for text in case.documents]
    texts = sorted({*texts, *ODD_TEXTS.values()})
    for choice in ("auto", "reference"):
        encoded = Encoder(gemma, fast_path(gemma, choice)).encode(texts, str)
        ends = np.cumsum(encoded.lengths)
        for text, ids in zip(texts, np.split(encoded.ids, ends[:-1]), strict=True):
            assert gemma.decode(ids.tolist()) == decoded(text)
            assert not set(ids.tolist()) & set(gemma.special_ids.values())


def test_file_that_changes_or_goes_between_planning_and_reading(tmp_path: Path) -> None:
    def changed(path: Path, what: str) -> None:
        data = path.read_bytes()
        source = resolve_source((str(path),), None)
        parts = list_parts(source, 1 << 20)
        if what == "gone":
            path.unlink()
        elif what == "shorter":
            os.truncate(path, len(data) // 2)
        elif what == "longer":
            path.write_bytes(data * 2)
        else:
            path.write_bytes(data.swapcase())
        with pytest.raises(UserError) as caught:
            list(read_parts(source, parts, "text", "skip"))
        assert caught.value.where is not None
        assert caught.value.where.startswith(str(path))
        assert caught.value.exit_code == ExitCode.BAD_INPUT

    contents = {".txt": AB, ".jsonl": MANY, ".jsonl.gz": gzip.compress(MANY)}
    contents[".parquet"] = parquet(COLUMN)
    for suffix, content in contents.items():
        for what in ("gone", "shorter", "longer", "rewritten"):
            path = tmp_path / f"{what}{suffix}"
            path.write_bytes(content)
            changed(path, what)


def test_unreadable_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "in.txt").write_text("x")
    (tmp_path / "in.txt").write_text("x")
    (tmp_path / "in.txt").chmod(0)
    (tmp_path / "closed").chmod(0)
    code = (
        "import os, sys\n"
        "from kiem.data.read.sources import resolve_source\n"
        "from kiem.core.errors import UserError\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(resolve_source((name,), None))\n"
        "    except UserError as error: print(error.exit_code, error.what)\n"
    )
    # Another user must reach the folder of the test.
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    closed = tmp_path / "closed"
    names = [tmp_path, tmp_path / "in.txt", closed, closed / "in.txt"]
    command = [sys.executable, "-c", code, *map(str, names), "x" * 300]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    denied = "7 cannot be read (Permission denied)"
    assert done.stdout.splitlines() == [denied] * 4 + ["7 cannot be read (File name too long)"]


def test_names_that_are_no_file(tmp_path: Path) -> None:
    for pattern in ("", str(tmp_path / "*.txt"), str(tmp_path / "a.txt")):
        with pytest.raises(UserError, match="no such file"):
            resolve_source((pattern,), None)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("a.txt")
    with pytest.raises(UserError, match="named twice"):
        resolve_source((str(tmp_path),), None)


def test_longer_than_a_document_may_be(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rows", "source_file", "json_files", "text_files"):
        monkeypatch.setattr(f"kiem.data.read.{module}.MAX_DOCUMENT_BYTES", 200)
    long = line("x" * 300)
    for suffix, content, kept, too_long in (
        (".jsonl", AB + long + AB + long[:-1], 4, 2),
        (".jsonl.gz", gzip.compress(long + AB + long), 2, 2),
        (".parquet", parquet({"text": ["a", "x" * 201, "x" * 200]}), 2, 1),
        (".txt", b"x" * 201, 0, 1),
    ):
        path = run.source / f"in{suffix}"
        path.write_bytes(content)
        for unit_bytes in (50, 1 << 20):
            manifest = run("skip", unit_bytes)
            assert manifest["rejected"] == {"too long": too_long}
            assert run.documents().total() == len(GOOD) + kept
        path.unlink()


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_words_are_counted_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kiem.data.read.sources._WORD_BLOCK", block)
    spaces = "".join(f"a{space}{space}b" for space in map(chr, range(0x110000)) if space.isspace())
    for text in [*ODD_TEXTS.values(), "", " ", "een  twee", spaces, *GOOD]:
        assert count_words(text) == len(text.split())


@pytest.mark.slow
def test_a_line_of_100_mb_in_bounded_memory(tmp_path: Path, gemma_tokenizer_file: Path) -> None:
    text = " ".join(ODD_TEXTS["combining marks"].split() + GOOD)
    long = (text + " ") * (100_000_000 // len(text.encode()))
    (tmp_path / "in.jsonl").write_bytes(line(GOOD[0]) + line(long) + line(GOOD[1]) + b"[1]")
    command = [
        sys.executable,
        "preprocess.py",
        "--source",
        tmp_path / "in.jsonl",
        "--num-proc",
        "1",
    ]
    command += ["--tokenizer", gemma_tokenizer_file, "--output-dir", tmp_path / "out"]
    command += ["--on-bad-document", "skip"]
    program = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(program.pid, 0)
    program.returncode = os.waitstatus_to_exitcode(status)
    assert program.returncode == 0
    assert read_manifest(tmp_path / "out" / "chunked_in")["documents_read"] == 4
    assert usage.ru_maxrss * 1024 < 2_000_000_000


def fuzzed_contents(suffix: str, texts: list[str]) -> list[bytes]:
    """Returns sound files with some texts, to be damaged."""
    lines = b"".join(map(line, texts))
    columns = {"text": texts, "source": texts}
    rows = [{"text": text} for text in texts]
    if suffix == ".parquet":
        return [
            parquet(columns, row_group_size=size, **more)
            for size in (3, 100)
            for more in ({}, {"compression": "none"}, {"compression": "zstd"})
        ]
    if suffix in (".arrow", ".feather"):
        return [feather(columns), stream(columns)]
    if suffix == ".csv":
        table = io.StringIO()
        csv.writer(table).writerows(
            zip(*([name, *column] for name, column in columns.items()), strict=True)
        )
        return [table.getvalue().encode()]
    return {
        ".txt": [text.encode() for text in texts],
        ".jsonl": [lines],
        ".jsonl.gz": [gzip.compress(lines), gzip.compress(lines[:50]) + gzip.compress(lines[50:])],
        ".jsonl.zst": [zstd(lines), zstd(lines[:50]) + zstd(lines[50:])],
        ".jsonl.bz2": [bz2.compress(lines)],
        ".jsonl.xz": [lzma.compress(lines)],
        ".json": [lines, *(json.dumps(rows, indent=n).encode() for n in (None, 1))],
    }[suffix]


@pytest.mark.parametrize(
    "suffix",
    [
        *(".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".json", ".csv"),
        *(".parquet", ".arrow", ".feather"),
    ],
)
def test_files_with_random_damage_are_read_or_refused(suffix: str, tmp_path: Path) -> None:
    """Bits flipped, parts cut out, doubled or mixed: rows or a UserError, nothing else."""
    seed = int(os.environ.get("KIEM_CHAOS_SEED", "0"))
    print(f"KIEM_CHAOS_SEED={seed}")
    chance = random.Random(f"{seed}{suffix}")
    texts = [*(text for text in ODD_TEXTS.values() if len(text) < 100), *GOOD]
    contents = fuzzed_contents(suffix, texts)
    path = tmp_path / f"in{suffix}"
    for _ in range(int(os.environ.get("KIEM_FUZZ_FILES", "250"))):
        path.write_bytes(_damage(chance.choice(contents), chance))
        outcomes = {_outcome(path, unit_bytes) for unit_bytes in (1 << 20, 301, 64)}
        assert len(outcomes) == 1, "the size of the parts changed what was read"


def _damage(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5])):
        if not changed:
            break
        start, length = chance.randrange(len(changed)), chance.choice([1, 2, 8, 100])
        # The tail of a Parquet file says where everything is.
        start = chance.choice([start, max(0, len(changed) - 1 - start % 400)])
        kind = chance.randrange(5)
        if kind == 0:
            changed[start] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[start : start + length]
        elif kind == 2:
            changed[start:start] = changed[start : start + length]
        elif kind == 3:
            changed[start : start + length] = chance.randbytes(length)
        else:
            del changed[start:]
    return bytes(changed)


def _outcome(path: Path, unit_bytes: int) -> str:
    try:
        source = resolve_source((str(path),), None)
        found = read_parts(source, list_parts(source, unit_bytes), "text", "skip")
        rows = [row for _, row in found]
    except UserError as error:
        assert error.exit_code == ExitCode.BAD_INPUT
        return f"{error.where}: {error.what}"
    assert all((not row.text) != (row.problem is None) for row in rows)
    return json.dumps([(row.text, row.problem and row.problem.reason, row.source) for row in rows])
