"""Commands of `kiem`: every script under one name, with the same options.

`kiem train`, or `accelerate launch -m kiem train` on several devices, is `training.py`, and so on.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from kiem.cli import flags, report_errors, run
from kiem.config import (
    EvaluationOptions,
    ExportOptions,
    InferenceOptions,
    PreprocessOptions,
    ReportOptions,
    TrainingOptions,
)
from kiem.core.console import show
from kiem.core.values import option_flag, option_types

_COMPLETION = """_kiem() {{
  local words=
  case "$COMP_CWORD ${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _kiem kiem
"""


@dataclass(frozen=True)
class Command:
    """A script as a command.

    Attributes:
        script: the script that does the same.
        options: its dataclass of options.
        module, function: what to call with the options and a console; imported only then.
        arguments: added before the user's arguments.
    """

    script: str
    options: type[Any]
    module: str
    function: str
    arguments: tuple[str, ...] = ()

    def __call__(self, options: Any, console: Console) -> None:
        """Runs the command."""
        getattr(importlib.import_module(self.module), self.function)(options, console)


COMMANDS = {
    "preprocess": Command(
        "preprocess.py", PreprocessOptions, "kiem.data.prepare.preprocess", "preprocess"
    ),
    "train": Command("training.py", TrainingOptions, "kiem.training.loop", "train"),
    "generate": Command("inference.py", InferenceOptions, "kiem.inference.generate", "generate"),
    "serve": Command(
        "inference.py", InferenceOptions, "kiem.inference.generate", "generate", ("--serve",)
    ),
    "evaluate": Command("evaluate.py", EvaluationOptions, "kiem.evaluation.command", "evaluate"),
    "export": Command("export.py", ExportOptions, "kiem.export.export", "export"),
    "report": Command("report.py", ReportOptions, "kiem.report.page", "report"),
}


def main() -> int:
    """Runs the command that the command line names and returns its exit code."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        command = COMMANDS[arguments[0]]
        rest = [*command.arguments, *arguments[1:]]
        return run(command.options, f"kiem {arguments[0]}", command, rest)
    return report_errors(lambda console: _main(arguments, console))


def _main(arguments: list[str], console: Console) -> None:
    """Handles arguments without a command: completion, help or a mistake."""
    if arguments == ["--print-completion"]:
        show(console, completion())
        return
    parser = argparse.ArgumentParser(
        "kiem",
        description="Train Gemma 3 language models from scratch on Dutch text.",
        epilog="kiem --print-completion: a script that completes commands and options in bash.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        script = " ".join([command.script, *command.arguments])
        text = f"{command.options.__doc__} ({script})"
        commands.add_parser(name, help=text.replace("%", "%%"))
    parser.parse_args(arguments)


def completion() -> str:
    """Returns a bash script, which zsh can read, for commands, options and choices."""
    cases = [f"1\\ *) words='{' '.join(COMMANDS)}' ;;"]
    for name, command in COMMANDS.items():
        kinds = option_types(command.options)
        for option, kind in kinds.items():
            if kind.choices:
                choices = " ".join(kind.choices)
                cases.append(f"*\\ {name}\\ {option_flag(option)}) words='{choices}' ;;")
        words = " ".join(flag for option, kind in kinds.items() for flag in flags(option, kind))
        cases.append(f"*\\ {name}\\ *) words='{words} --config --help' ;;")
    return _COMPLETION.format(cases="\n".join(f"    {case}" for case in cases))
