"""The `kiem` command: the scripts under one name."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from kiem.commands import COMMANDS, main

KIEM = ("-m", "kiem")
SLOW_IMPORTS = {
    *("torch", "numpy", "pyarrow", "tokenizers", "huggingface_hub", "accelerate", "datasets"),
    *("transformers", "jinja2", "starlette"),
}


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name].script])
def test_a_command_is_its_script(name: str) -> None:
    command = COMMANDS[name]
    assert command.script
    shown = run_script(*KIEM, name, "--help").stdout
    of_script = run_script(command.script, "--help").stdout
    assert shown.replace(f"kiem {name}", command.script).split() == of_script.split()
    # The function that the script hands its options to is the one the command calls.
    text = (ROOT / command.script).read_text(encoding="utf-8")
    assert f"from {command.module} import {command.function}" in text
    assert callable(getattr(importlib.import_module(command.module), command.function))


def test_every_script_is_a_command() -> None:
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == {command.script for command in COMMANDS.values() if command.script}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_comes_at_once(name: str) -> None:
    """Nothing is imported for it that takes long."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['kiem', *{name.split()}, '--help']\n"
        "try: runpy.run_module('kiem', run_name='__main__')\n"
        f"except SystemExit as end: print(end.code, sorted({SLOW_IMPORTS} & {{*sys.modules}}))"
    )
    assert run_script("-c", code).stdout.splitlines()[-1] == "0 []"


def test_a_command_works_and_mistakes_name_the_commands(trained_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    done = run_script(*KIEM, "report", "--runs", trained_run, "--output", output)
    assert done.returncode == 0, done.stderr
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    installed = Path(sys.executable).parent / "kiem"
    assert subprocess.run([installed, "--help"], capture_output=True, check=False).returncode == 0
    done = run_script(*KIEM, "trian")
    assert done.returncode == 2
    assert "preprocess" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("columns", ["1", "5", "10"])
@pytest.mark.parametrize("words", [[], ["train"]])
def test_help_ends_in_any_terminal(
    words: list[str],
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["kiem", *words, "--help"])
    monkeypatch.setenv("COLUMNS", columns)
    with contextlib.suppress(SystemExit):
        assert main() == 0
    assert "train" in capsys.readouterr().out
    assert os.environ["COLUMNS"] == columns
