"""Disks that are full or read-only, and files in which bits flip."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import Disk, run_script
from rich.console import Console

from kiem.compute.native import load_library
from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.prepare import units
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)
# preprocess.py on a disk of which the system says what it cannot do.
POOR_DISK = """
import errno, fcntl, os, sys
from kiem.cli import run
from kiem.config import PreprocessOptions
from kiem.data.prepare import units
from preprocess import main

def refuse(number):
    def call(*_):
        raise OSError(number, os.strerror(number))
    return call

os.fsync, fcntl.flock = refuse(errno.EINVAL), refuse(errno.ENOLCK)
units.UNIT_BYTES = 20_000
sys.exit(run(PreprocessOptions, "preprocess.py", main))
"""
_STEP_BYTES = 64_000


@pytest.fixture
def made_of(
    tmp_path: Path,
    sample_texts: list[str],
    trained: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, object]:
    """Options for text of which much is kept and much rejected, in several units.

    Some of it is compressed, so that its size says little about the space that is needed.
    """
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    texts = [f"{text}\nDit is zin {n}." for n in range(4) for text in sample_texts]
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[::2]]]
    for part in range(4):
        data = "\n".join(lines[part::4]).encode()
        (tmp_path / f"{part}.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "more.jsonl").write_text("\n".join(lines[:9]))
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    return {
        "source": (str(tmp_path / "*.jsonl.gz"), str(tmp_path / "more.jsonl")),
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "chunk_size": 64,
        "name": "made",
        "num_proc": 1,
        "clean": "dutch",
        "keep_rejected": True,
    }


def options(given: dict[str, object], output: Path, **changes: object) -> PreprocessOptions:
    return PreprocessOptions(**{**given, "output_dir": output, **changes})  # type: ignore[arg-type]


def command(given: dict[str, object], output: Path) -> list[str]:
    """preprocess.py with the same options."""
    words = ["preprocess.py", "--output-dir", str(output), "--source"]
    words += given["source"]  # type: ignore[arg-type]
    for name in ("tokenizer", "chunk_size", "name", "num_proc", "clean"):
        words += [f"--{name.replace('_', '-')}", str(given[name])]
    return [*words, "--keep-rejected"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_full_disk(disk: Disk, made_of: dict[str, object], tmp_path: Path) -> None:
    """The disk is a little larger at every try, so that it is full at every stage once."""
    expected = contents(preprocess(options(made_of, tmp_path / "elsewhere"), QUIET))
    disk.fill()
    done = run_script(*command(made_of, disk.path))
    assert done.returncode == ExitCode.DISK_SPACE
    assert str(disk.path) in done.stderr
    assert "Traceback" not in done.stderr
    full = set()
    for num_steps in range(2, 100):
        try:
            folder = preprocess(options(made_of, disk.path), QUIET)
            break
        except UserError as error:
            assert error.exit_code == ExitCode.DISK_SPACE
            assert error.where is not None
            assert error.where.startswith(str(disk.path))
            if "the disk is full" in error.what:
                full.add(Path(error.where).name.lstrip("0123456789"))
        assert not (disk.path / "made").exists()
        disk.remount(f"size={num_steps * _STEP_BYTES}")
    assert {"plan.json", ".unit", "made", "rejected.jsonl"} <= full, "not at every stage"
    assert contents(folder) == expected
    assert {path.name for path in disk.path.iterdir()} == {"full", "made"}


def test_read_only_disk(disk: Disk, made_of: dict[str, object]) -> None:
    disk.remount("size=100M,ro")
    done = run_script(*command(made_of, disk.path / "out"))
    assert done.returncode == ExitCode.NOT_WRITABLE
    assert str(disk.path) in done.stderr
    assert "Traceback" not in done.stderr
    disk.remount("rw")
    folder = preprocess(options(made_of, disk.path), QUIET)
    shutil.copytree(folder, disk.path / ".other.unfinished")  # to be removed, but it cannot be
    made = contents(folder)
    disk.remount("ro")
    assert preprocess(options(made_of, disk.path), QUIET) == folder, "nothing is to be written"
    for changes in ({"name": "other", "overwrite": True}, {"name": "other"}, {"overwrite": True}):
        with pytest.raises(UserError) as caught:
            preprocess(options(made_of, disk.path, **changes), QUIET)
        assert caught.value.exit_code == ExitCode.NOT_WRITABLE
        assert str(disk.path) in str(caught.value)
    assert contents(folder) == made


def test_disk_that_becomes_read_only_midway(disk: Disk, made_of: dict[str, object]) -> None:
    """Work is under way; whatever the next run wants to do with it, the person is told why not."""
    disk.remount("size=700k")
    with pytest.raises(UserError, match="the disk is full") as full:
        preprocess(options(made_of, disk.path), QUIET)
    finished = contents(disk.path / ".made.unfinished")
    assert finished
    disk.remount("size=100M,ro")  # which a file that is open for writing would prevent
    assert full.value.exit_code == ExitCode.DISK_SPACE
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(UserError) as caught:
            preprocess(options(made_of, disk.path, **changes), QUIET)
        assert caught.value.exit_code == ExitCode.NOT_WRITABLE
        assert str(disk.path) in str(caught.value)
        assert contents(disk.path / ".made.unfinished") == finished


def test_a_disk_without_fsync_and_locks(made_of: dict[str, object], tmp_path: Path) -> None:
    """One warning for each, however many processes write, and the same chunks as elsewhere."""
    expected = contents(preprocess(options(made_of, tmp_path / "elsewhere"), QUIET))
    words = command(made_of, tmp_path / "out")
    words[words.index("--num-proc") + 1] = "2"
    done = run_script("-c", POOR_DISK, *words[1:])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = [line for line in done.stdout.splitlines() if line.startswith("warning:")]
    assert len(said) == 2
    assert "this disk has no locks" in said[0]
    assert "(No locks available)" in said[0]
    assert "this disk does not say when files are safe from a power failure" in said[1]
    assert contents(tmp_path / "out" / "made") == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["made"]


def test_no_place_to_compile_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faster kernels are not needed for any result."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    (tmp_path / "kernels.cpp").write_text("")
    assert isinstance(load_library(tmp_path / "kernels.cpp", {}), str)


def test_every_flipped_bit_is_found(made_of: dict[str, object], tmp_path: Path) -> None:
    """Random bits of every file of a chunk directory, one at a time; --verify names the file."""
    folder = preprocess(options(made_of, tmp_path / "out"), QUIET)
    seed = int(os.environ.get("KIEM_CHAOS_SEED", "0"))
    print(f"KIEM_CHAOS_SEED={seed}")
    chance = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {"manifest.json", "tokenizer.json", "rejected.jsonl", "state.json"} <= {
        path.name for path in files
    }
    for file in files:
        data = file.read_bytes()
        for _ in range(60 if file.name == "manifest.json" else 8):
            place, bit = chance.randrange(len(data)), chance.randrange(8)
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(UserError) as caught:
                verify_directory(folder)
            assert caught.value.exit_code in (
                ExitCode.DAMAGED,
                ExitCode.BAD_INPUT,
                ExitCode.TOKENIZER_MISMATCH,
            )
            assert str(file) in str(caught.value) or file.name in caught.value.what
        file.write_bytes(data)
    verify_directory(folder)
