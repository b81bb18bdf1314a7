"""Prompts into a file: the same lines, however often stopped and over however many processes."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_script
from rich.console import Console

from kiem.config import InferenceOptions
from kiem.core.errors import ExitCode, UserError
from kiem.inference.generate import generate, read_prompts

NUM_PROMPTS = 12
STARTS = ("De stad", "Het water", "Een huis", "In de winter")


@pytest.fixture(scope="module")
def options(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> InferenceOptions:
    """Two continuations of each of the prompts; the output file is still to come."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": f"{STARTS[n % 4]} {n}\nen"} for n in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return InferenceOptions(
        model_path=str(trained_run / "final_model"),
        prompts_file=prompts,
        num_return_sequences=2,
        max_new_tokens=60,
        stop=("de de",),
        max_requests=3,
    )


@pytest.fixture(scope="module")
def command(options: InferenceOptions) -> tuple[str, ...]:
    """The same as a command."""
    given = dataclasses.asdict(options)
    names = ("model_path", "prompts_file", "num_return_sequences", "max_new_tokens", "max_requests")
    words = [word for n in names for word in ("--" + n.replace("_", "-"), str(given[n]))]
    return ("inference.py", *words, "--stop", *options.stop)


@pytest.fixture(scope="module")
def expected(
    options: InferenceOptions, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What an undisturbed run of one process writes."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    generate(replace(options, output_file=output), Console(quiet=True))
    assert list(output.parent.iterdir()) == [output]
    return read(output)


def read(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def test_what_a_line_says(expected: list[dict[str, Any]]) -> None:
    assert len(expected) == 2 * NUM_PROMPTS
    for place, line in enumerate(expected):
        assert line["prompt"] == f"{STARTS[place // 2 % 4]} {place // 2}\nen"
        assert line.keys() == {"prompt", "text", "tokens", "seed", "finish_reason"}
        assert line["finish_reason"] in ("eos", "length", "stop")
        assert (line["finish_reason"] == "length") == (line["tokens"] == 60)
        assert "de de" not in line["text"]
    assert len({line["text"] for line in expected}) > NUM_PROMPTS


@pytest.mark.parametrize("max_requests", [1, 8])
def test_the_number_at_a_time_changes_nothing(
    options: InferenceOptions, expected: list[dict[str, Any]], tmp_path: Path, max_requests: int
) -> None:
    output = tmp_path / "out.jsonl"
    changed = replace(options, max_requests=max_requests, output_file=output)
    generate(changed, Console(quiet=True))
    assert read(output) == expected


def test_killed_and_started_again_gives_the_same(
    command: tuple[str, ...], expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Killed twice, each time after some more lines; the second time one is cut in the middle."""
    output = tmp_path / "out.jsonl"
    words = [sys.executable, *command, "--output-file", str(output)]
    num_before = 0
    for _ in range(2):
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while (num_lines := count_lines(tmp_path)) < num_before + 4:
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        assert not output.exists()
        num_before = num_lines
    (journal,) = tmp_path.iterdir()
    num_before = count_lines(tmp_path)
    assert num_before < 2 * NUM_PROMPTS
    journal.write_bytes(journal.read_bytes()[:-9])
    done = run_script(*words[1:])
    assert done.returncode == 0, done.stderr
    assert f"{num_before - 1} of {2 * NUM_PROMPTS} continuations are there already" in done.stdout
    assert read(output) == expected
    assert list(tmp_path.iterdir()) == [output]


def count_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(".out.jsonl.unfinished-*"))


def test_another_command_does_not_go_on_with_it(
    options: InferenceOptions,
    command: tuple[str, ...],
    expected: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """A journal belongs to its options: what they made is neither mixed in nor lost."""
    output = tmp_path / "out.jsonl"
    words = [sys.executable, *command, "--output-file", str(output), "--seed", "7"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while count_lines(tmp_path) < 2:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    (journal,) = tmp_path.iterdir()
    generate(replace(options, output_file=output), Console(quiet=True))
    assert read(output) == expected
    assert set(tmp_path.iterdir()) == {output, journal}


@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc_per_node=2"),
        ("accelerate.commands.launch", "--num_processes=2", "--cpu"),
    ],
)
def test_two_processes_write_the_same(
    command: tuple[str, ...],
    expected: list[dict[str, Any]],
    tmp_path: Path,
    launcher: tuple[str, ...],
) -> None:
    output = tmp_path / "out.jsonl"
    done = run_script("-m", *launcher, *command, "--output-file", output)
    assert done.returncode == 0, done.stderr
    assert read(output) == expected
    assert list(tmp_path.iterdir()) == [output]


def test_processes_without_a_common_file_are_refused(trained_run: Path) -> None:
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    model = trained_run / "final_model"
    done = run_script("inference.py", "--model-path", model, "--prompt", "De", env=env)
    assert done.returncode == ExitCode.BAD_OPTION
    assert "--output-file" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 5}', "not a string"),
        ('{"text": "x"}', "no column 'prompt'; there is 'text'"),
        ("[" * 100_000, "nested too deeply"),
        (r'{"prompt": "\ud83d"}', "half a surrogate pair"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "goed"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as found:
        read_prompts(None, path)
    assert found.value.where == f"{path}:2"
    assert found.value.exit_code == ExitCode.BAD_INPUT
