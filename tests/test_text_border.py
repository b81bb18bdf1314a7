"""Text that comes in or goes out: JSON of people, arguments, terminals that show less."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from conftest import ROOT, run_script
from rich.progress import Progress, TextColumn
from rich.table import Table

from kiem.cli import run
from kiem.commands import COMMANDS
from kiem.config import InferenceOptions, PreprocessOptions
from kiem.core.console import PlainConsole, show, warn
from kiem.core.errors import ExitCode, UserError
from kiem.core.json_input import MAX_DEPTH, parse_json, read_json
from kiem.core.values import option_types

FIX = "Mend it."


class Shape(msgspec.Struct):
    """What the files of these tests must hold."""

    layers: Annotated[int, msgspec.Meta(ge=1, le=100)]
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    names: list[str] = []
    shares: dict[str, float] = {}


def read(data: bytes, folder: Path) -> Shape:
    path = folder / "in.json"
    path.write_bytes(data)
    return read_json(path, Shape, fix=FIX, exit_code=ExitCode.BAD_INPUT)


JSON_THAT_IS_READ: dict[str, tuple[bytes, Any]] = {
    "plain": (b'{"layers": 3}', {"layers": 3}),
    "byte order mark": (b'\xef\xbb\xbf{"layers": 3}', {"layers": 3}),
    "pair in escapes": (b'{"x": "\\ud83d\\ude00"}', {"x": "\N{GRINNING FACE}"}),
    "line separator": ('{"x": "a\u2028b"}'.encode(), {"x": "a\u2028b"}),
    "long number": (b'{"x": %s}' % (b"9" * 5000), {"x": float("inf")}),
    "number of 300 digits": (b"9" * 300, int("9" * 300)),
    "deep": (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, ...),
}
DEEP = b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)
JSON_THAT_IS_REFUSED = {
    "empty": (b"", ":1: empty"),
    "blank": (b" \n \n", ":3: empty"),
    "cut": (b'{"layers": 3,\n"na', ":2: not JSON (Unterminated string starting at at character 1)"),
    "lines": (b'{"layers": 3}\n{"layers": 3}', ":2: not JSON (Extra data at character 1)"),
    "not UTF-8": (b'{"layers": 3,\n"x": "caf\xe9"}', ":2: not UTF-8"),
    "UTF-16": ('{"layers": 3}'.encode("utf-16"), ":1: not UTF-8"),
    "too deep": (DEEP, ": not JSON (nested too deeply)"),
    "far too deep": (b'{"a":' * 100_000, ": not JSON (nested too deeply)"),
    "deep elsewhere": (b'{"layers": 3, "x": %s}' % DEEP, ": not JSON (nested too deeply)"),
    "half a pair": (
        b'{"layers": 3, "x": ["", "a\\ud800"]}',
        ': half a surrogate pair after {"layers": 3, "x": ["", "a',
    ),
    "half a pair in a key": (
        b'{"layers": 3, "\\uDC00": 1}',
        ': half a surrogate pair after {"layers": 3, "',
    ),
    "key twice": (
        b'{"layers": 3, "layers": 4}',
        ': the key "layers" stands twice in an object',
    ),
    "array": (b"[]", ": expected object, got array"),
    "null": (b"null", ": expected object, got null"),
    "key missing": (b"{}", ": object missing required field layers"),
    "fraction": (b'{"layers": 6.5}', ": layers = 6.5: expected int"),
    "whole float": (b'{"layers": 6.0}', ": layers = 6.0: expected int"),
    "boolean": (b'{"layers": true}', ": layers = true: expected int"),
    "text": (b'{"layers": "3"}', ': layers = "3": expected int'),
    "zero": (b'{"layers": 0}', ": layers = 0: expected int >= 1"),
    "many": (b'{"layers": 1000000000}', ": layers = 1000000000: expected int <= 100"),
    "thousands of digits": (
        b'{"layers": %s}' % (b"9" * 5000),
        ": layers = Infinity: expected int",
    ),
    "NaN": (b'{"layers": 3, "share": NaN}', ": share = NaN: expected float > 0.0"),
    "infinity": (b'{"layers": 3, "share": 1e999}', ": share = Infinity: expected float <= 1.0"),
    "inside a list": (b'{"layers": 3, "names": ["a", {}]}', ": names[1] = {}: expected str"),
    "in an object": (b'{"layers": 3, "shares": {"a": "x"}}', ": shares[...]: expected float"),
    "long value": (
        b'{"layers": "%s"}' % (b"x" * 500),
        f': layers = "{"x" * 56}...: expected int',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JSON_THAT_IS_READ)
def test_json_that_is_read(name: str) -> None:
    data, expected = JSON_THAT_IS_READ[name]
    value = parse_json(data)
    assert expected is ... or value == expected


@pytest.mark.parametrize("name", JSON_THAT_IS_REFUSED)
def test_json_that_is_refused_names_its_place(name: str, tmp_path: Path) -> None:
    data, expected = JSON_THAT_IS_REFUSED[name]
    with pytest.raises(UserError) as caught:
        read(data, tmp_path)
    assert str(caught.value) == f"{tmp_path / 'in.json'}{expected}\n  {FIX}"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path, Shape, fix=FIX, exit_code=ExitCode.BAD_INPUT)


# Texts that a markup parser, an emoji table or a terminal would not show as they are.
HOSTILE = ("out/x[/b]", "[red]a[/]", "[/]", "[link=x]", ":smile:", "[", "\\[b]", "{task}", "%s")
STEERING = "a\x1b[31mb\x07\x9b2Jc\r"


@pytest.mark.parametrize("text", [*HOSTILE, STEERING])
def test_consoles_show_text_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "a[31mb2Jc" if text == STEERING else text
    console = PlainConsole()
    table = Table(text, title=text)
    table.add_row(text)
    progress = Progress(TextColumn("{task.description}", markup=False), console=console)
    progress.add_task(text)
    console.print(text)
    console.print(text, style="dim", end="\n")
    console.print(f"error: {UserError(text, fix=text, exit_code=ExitCode.DAMAGED)}")
    console.print(table)
    if text in HOSTILE:  # what our displays describe are numbers
        console.print(progress)
    warn(console, text)
    show(console, text)
    with console.status(text):
        pass
    shown = capsys.readouterr().out
    assert shown.count(expected) == (10 if text in HOSTILE else 9)
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(shown)


def test_no_text_reaches_a_markup_parser() -> None:
    """Consoles are made in one module, and nothing in the package asks rich for markup."""
    for path in sorted((ROOT / "kiem").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("rich.markup", "rich.logging", "rich.prompt"), place
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("from_markup", "markup"), place
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            assert name != "Console", f"{place}: use PlainConsole"
            assert name != "print" or path.name == "reference.py", f"{place}: use a console"
            if name == "TextColumn":
                assert isinstance(keywords.get("markup"), ast.Constant), place
            if "markup" in keywords:
                value = keywords["markup"]
                assert isinstance(value, ast.Constant) and value.value is False, place


# A program that prints what it is given, and then does its work.
PROGRAM = r"""
import subprocess, sys
from pathlib import Path
from kiem.cli import run
from kiem.core.console import warn
from kiem.config import ReportOptions
def main(options, console):
    warn(console, "caf\xe9 \u20ac \U0001f600 \udce9")
    print("a library's own words \u20ac")
    print("and its complaints \u20ac", file=sys.stderr)
    for number in range(10_000):
        console.print(f"line {number} \u20ac")
    subprocess.run([sys.executable, "-c", "print(chr(8364))"], check=True)
    options.runs[0].write_text("done")
sys.exit(run(ReportOptions, "report.py", main))
"""
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
TERMINALS: dict[str, tuple[str, dict[str, str]]] = {
    **{
        encoding: ("", {"PYTHONIOENCODING": encoding})
        for encoding in ("utf-8", "iso8859-15", "ascii", "ascii:strict", "cp1252", "utf-16")
    },
    "LANG=C": ("", {"LC_ALL": "C"}),
    "LANG=C, all the same": ("", C_LOCALE),
    "closed output": (">&-", {}),
    "closed error": ("2>&-", {}),
    "closed all": ("<&- >&- 2>&-", {}),
    "full disk": (">/dev/full 2>/dev/full", {}),
    "reader that leaves": ("2>&1 | head -n 1", {}),
    "reader that is gone": ("2>&1 | true", {}),
}


@pytest.mark.parametrize("name", TERMINALS)
def test_output_ends_no_work(name: str, tmp_path: Path) -> None:
    redirection, env = TERMINALS[name]
    mark = tmp_path / "mark"
    words = 'set -o pipefail; "$0" -c "$1" --runs "$2" '
    done = subprocess.run(
        ["bash", "-c", words + redirection, sys.executable, PROGRAM, str(mark)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert mark.read_text() == "done"
    assert b"Error" not in done.stderr
    if not redirection and "16" not in name:
        assert b"line 9999" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_that_are_not_utf8_are_refused_by_name(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: Any) -> None:
        pytest.fail("the work began")

    command = COMMANDS[name]
    required = {
        field.name: "x"
        for field in dataclasses.fields(command.options)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    num_refused = 0
    for option, kind in option_types(command.options).items():
        if kind.choices or kind.base not in (str, Path):
            continue
        for bad in ("caf\udce9", "\udc80", "\ud800x"):
            values = {**required, option: bad}
            words = [w for n, v in values.items() for w in (f"--{n.replace('_', '-')}", v)]
            assert run(command.options, name, work, words) == ExitCode.BAD_OPTION
            error = capsys.readouterr().err
            assert f"--{option.replace('_', '-')}: not UTF-8" in error
            num_refused += 1
    assert num_refused >= 6


def test_names_in_brackets_and_a_small_terminal(
    sample_chunks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was a MarkupError after the work, and a UnicodeEncodeError in the middle of it."""
    folder, prompt = tmp_path / "x[/b]", "[/b] :smile: \u20ac \U0001f600"
    done = run_script(
        *("training.py", "--dataset-path", sample_chunks, "--model", "gemma3-micro"),
        *("--output-dir", folder, "--run-name", "r", "--max-steps", "2", "--eval-steps", "1"),
        *("--batch-size", "1", "--gradient-accumulation-steps", "1", "--precision", "fp32"),
        *("--sample-prompt", prompt, "[red]", "--compile", "never"),
        env={"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "  [/b] :smile: ? ?" in done.stdout
    model = folder / "r" / "final_model"
    assert str(model) in done.stdout
    words = ["--model-path", str(model), "--max-new-tokens", "5", "--prompt", prompt]
    assert run(InferenceOptions, "inference.py", COMMANDS["generate"], words) == 0
    assert f"> {prompt}" in capsys.readouterr().out
    words = ["--source", "sample", "--tokenizer", "train:600", "--output-dir", str(folder)]
    assert run(PreprocessOptions, "preprocess.py", COMMANDS["preprocess"], words) == 0
    assert str(folder / "chunked_sample") in capsys.readouterr().out
