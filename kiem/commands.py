"""The `kiem` command: every script under one name, with the same options.

kiem train, and `accelerate launch -m kiem train` for several devices, are `training.py`, and so on.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console

from kiem.cli import around_tyro, command_line, report_errors, run
from kiem.config import (
    EvaluationOptions,
    ExportOptions,
    InferenceOptions,
    PreprocessOptions,
    ReportOptions,
    TrainingOptions,
)


@dataclass(frozen=True)
class Command:
    """A script as a command.

    Attributes:
        script: the script that does the same.
        options: its dataclass of options.
        module, function: what it calls with the options and a console; imported only then.
        arguments: what stands before the user's arguments.
    """

    script: str
    options: type[Any]
    module: str
    function: str
    arguments: tuple[str, ...] = ()

    def __call__(self, options: Any, console: Console) -> None:
        """Does what the script does."""
        getattr(importlib.import_module(self.module), self.function)(options, console)


COMMANDS = {
    "preprocess": Command(
        "preprocess.py", PreprocessOptions, "kiem.data.prepare.preprocess", "preprocess"
    ),
    "train": Command("training.py", TrainingOptions, "kiem.training.loop", "train"),
    "generate": Command("inference.py", InferenceOptions, "kiem.inference.write", "write"),
    "serve": Command(
        "inference.py", InferenceOptions, "kiem.inference.write", "write", ("--serve",)
    ),
    "evaluate": Command("evaluate.py", EvaluationOptions, "kiem.evaluation.command", "evaluate"),
    "export": Command("export.py", ExportOptions, "kiem.export.export", "export"),
    "report": Command("report.py", ReportOptions, "kiem.report.draw", "draw"),
}


def main() -> int:
    """Runs the command that the command line names and returns its exit code."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        command = COMMANDS[arguments[0]]
        rest = [*command.arguments, *arguments[1:]]
        return run(command.options, f"kiem {arguments[0]}", command, rest)
    return report_errors(lambda _: _help(arguments))


def _help(arguments: list[str]) -> None:
    """Answers what names no command: help, shell completion or a mistake; tyro exits after each."""
    options: dict[str, Callable[..., Any]] = {
        name: command_line(command.options) for name, command in COMMANDS.items()
    }
    with around_tyro(arguments):
        tyro.extras.subcommand_cli_from_dict(
            options,
            prog="kiem",
            description="Train Gemma 3 language models from scratch on Dutch text.",
            args=arguments,
        )
