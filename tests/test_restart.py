"""Preprocessing that is killed, or meets trouble with the disk, and is started again."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SMALL_UNITS_PROGRAM
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.prepare import units
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str], trained: Tokenizer
) -> Path:
    """Some 4 MB of text in several files, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        lines = [json.dumps({"text": f"{text} {n}"}) for n in range(12) for text in sample_texts]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    (folder / "tokenizer.json").write_bytes(trained.json_bytes)
    return folder


def command(corpus: Path, output: Path, *more: str) -> list[str]:
    source = [str(path) for path in sorted(corpus.glob("*.jsonl"))]
    options = ["--source", *source, "--tokenizer", str(corpus / "tokenizer.json")]
    options += ["--chunk-size", "256", "--output-dir", str(output), "--name", "made", *more]
    return [sys.executable, "-c", SMALL_UNITS_PROGRAM, *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(corpus, output, "--num-proc", "1"), cwd=ROOT, check=True)
    assert [path.name for path in output.iterdir()] == ["made"]
    return contents(output / "made")


def test_killed_at_any_moment_the_same_command_finishes_the_same(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    num_kills = 200 if os.environ.get("KIEM_CHAOS_SCALE") == "1.0" else 12
    kill_and_repeat(corpus, undisturbed, tmp_path, num_kills)


def test_killed_while_cleaning_the_same_command_finishes_the_same(
    corpus: Path, tmp_path: Path
) -> None:
    cleaning = ("--clean", "dutch", "--near-duplicates", "--keep-rejected")
    words = command(corpus, tmp_path / "undisturbed", "--num-proc", "1", *cleaning)
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    expected = contents(tmp_path / "undisturbed" / "made")
    assert expected["rejected.jsonl"].count(b"\n") > 1000
    num_kills = 60 if os.environ.get("KIEM_CHAOS_SCALE") == "1.0" else 4
    (tmp_path / "killed").mkdir()
    kill_and_repeat(corpus, expected, tmp_path / "killed", num_kills, *cleaning)


def kill_and_repeat(
    corpus: Path, expected: dict[str, bytes], output: Path, num_kills: int, *more: str
) -> None:
    """kill -9 of the program or of one of its workers, with changing numbers of workers."""
    seed = int(os.environ.get("KIEM_CHAOS_SEED", "0"))
    print(f"KIEM_CHAOS_SEED={seed}")
    chance = random.Random(seed)
    work = output / ".made.unfinished"
    finished: dict[str, int] = {}
    kills = runs = 0
    while kills < num_kills:
        runs += 1
        num_proc = str(chance.choice([1, 2, 3]))
        program = subprocess.Popen(
            command(corpus, output, "--num-proc", num_proc, *more),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_until_exists(work, program)
        time.sleep(chance.uniform(0, 1.2))
        victims = [psutil.Process(program.pid)] if program.poll() is None else []
        if victims and chance.random() < 0.3:
            victims = victims[0].children() or victims
        if victims:
            os.kill(chance.choice(victims).pid, signal.SIGKILL)
            kills += 1
        status = program.wait(60)
        assert status in (0, -signal.SIGKILL, ExitCode.OUT_OF_MEMORY)
        if (output / "made").exists():  # even after a kill, if that came just at the end
            assert contents(output / "made") == expected
            if status == 0:
                shutil.rmtree(output / "made")
            finished = {}
        else:
            assert status != 0
            now = {path.name: path.stat().st_mtime_ns for path in work.glob("*.unit")}
            assert finished.items() <= now.items(), "a finished unit was made again"
            finished = now
    words = command(corpus, output, *more)
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert contents(output / "made") == expected
    assert [path.name for path in output.iterdir()] == ["made"]


def _wait_until_exists(path: Path, program: subprocess.Popen[bytes]) -> None:
    """Waits until `path` is there, or the program that makes it has ended."""
    ends = time.monotonic() + 60
    while not path.exists() and program.poll() is None:
        assert time.monotonic() < ends
        time.sleep(0.01)


def options(corpus: Path, output: Path, **changes: object) -> PreprocessOptions:
    values = {
        "source": tuple(str(path) for path in sorted(corpus.glob("*.jsonl"))),
        "tokenizer": str(corpus / "tokenizer.json"),
        "chunk_size": 256,
        "output_dir": output,
        "name": "made",
        "num_proc": 1,
    }
    return PreprocessOptions(**{**values, **changes})  # type: ignore[arg-type]


class Interrupted(BaseException):
    """Stands for the end of the program."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_units: int) -> None:
    """Ends preprocessing after some units, as a kill does: nothing of ours runs after it."""
    original, done = units.finish_unit, [0]

    def stop_after(*arguments: object) -> object:
        if done[0] == num_units:
            raise Interrupted
        done[0] += 1
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("kiem.data.prepare.workers.local.finish_unit", stop_after)


def test_unfinished_work_is_not_reused_for_other_text_or_options(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 5)
        with pytest.raises(Interrupted):
            preprocess(options(corpus, tmp_path), QUIET)
    assert len(list(tmp_path.glob(".made.unfinished/*.unit"))) == 5
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    with (other / "0.jsonl").open("a") as file:
        file.write('\n{"text": "erbij"}')
    refused = [
        (options(corpus, tmp_path, chunk_size=128), "--chunk-size was 256"),
        (options(corpus, tmp_path, seed=7), "--seed was 42"),
        (options(corpus, tmp_path, packing="best-fit"), "--packing was 'concat'"),
        (options(corpus, tmp_path, tokenizer="train:600"), "--tokenizer was"),
        (options(other, tmp_path, tokenizer=str(corpus / "tokenizer.json")), "--source was other"),
    ]
    for changed, message in refused:
        with pytest.raises(UserError, match=message) as caught:
            preprocess(changed, QUIET)
        assert caught.value.exit_code == ExitCode.ALREADY_EXISTS
        assert "--overwrite" in caught.value.fix
    preprocess(options(corpus, tmp_path, num_proc=2), QUIET)
    assert contents(tmp_path / "made") == undisturbed
    preprocess(options(corpus, tmp_path, chunk_size=128, overwrite=True), QUIET)
    assert verify_directory(tmp_path / "made")["options"]["chunk_size"] == 128


def test_a_damaged_unit_is_made_again(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 6)
        with pytest.raises(Interrupted):
            preprocess(options(corpus, tmp_path), QUIET)
    for number, path in enumerate(sorted(tmp_path.glob(".made.unfinished/*.unit"))):
        data = bytearray(path.read_bytes())
        data[len(data) * number // 6] ^= 1
        path.write_bytes(data[: len(data) // 2] if number == 5 else data)
    preprocess(options(corpus, tmp_path), QUIET)
    assert contents(tmp_path / "made") == undisturbed


def test_two_programs_do_not_work_on_the_same(corpus: Path, tmp_path: Path) -> None:
    program = subprocess.Popen(
        command(corpus, tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait_until_exists(tmp_path / ".made.unfinished" / "plan.json", program)
    program.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="another process is working here"):
            preprocess(options(corpus, tmp_path), QUIET)
    finally:
        program.send_signal(signal.SIGCONT)
        program.wait(60)
    assert program.returncode == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_nothing_under_the_name(
    corpus: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """The n-th fsync fails, for many n; afterwards the same command still finishes the same."""
    monkeypatch.setattr(units, "UNIT_BYTES", 200_000)
    fsync = os.fsync
    for failing in (0, 1, 3, 8, 16, 20, 24, 30):
        calls = [0]

        def fail(descriptor: int, failing: int = failing, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] > failing:
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            with pytest.raises(UserError) as caught:
                preprocess(options(corpus, tmp_path), QUIET)
        assert caught.value.exit_code in (ExitCode.DISK_SPACE, ExitCode.NOT_WRITABLE)
        assert str(tmp_path) in str(caught.value)
        assert not (tmp_path / "made").exists()
    preprocess(options(corpus, tmp_path), QUIET)
    made = contents(tmp_path / "made")
    assert made == undisturbed, "the shards do not depend on the size of the units"


def test_an_error_in_a_worker_reaches_the_person(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = (corpus / "0.jsonl").read_text().splitlines()
    bad.write_text("\n".join([*lines[:500], '{"text": 3}', *lines[500:]]))
    words = command(corpus, tmp_path, "--num-proc", "3")
    words[words.index("--source") + 1] = str(bad)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.BAD_INPUT
    assert f"{bad}:501: the text is int, not a string" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    words.extend(["--on-bad-document", "skip"])
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rejected 1 of 3,841 documents: 1 not a string" in done.stdout
    manifest = verify_directory(tmp_path / "made")
    assert manifest["rejected"] == {"not a string": 1}
