"""Commands of `kiem`: every script under one name, with the same options, and some without one.

`kiem train`, or `accelerate launch -m kiem train` on several devices, is `training.py`, and so on.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from kiem.cli import report_errors, run
from kiem.config import (
    AuditOptions,
    EvaluationOptions,
    ExportOptions,
    InferenceOptions,
    LadderOptions,
    LookOptions,
    PreprocessOptions,
    ReportOptions,
    TrainingOptions,
)
from kiem.core.console import show
from kiem.core.errors import bad_option


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        script: the script that does the same; None: there is none.
        options: its dataclass of options.
        module, function: what to call with the options and a console; imported only then.
        arguments: added before the user's arguments.
        first: option that the first word belongs to when it is none itself: `kiem look DIR`.
    """

    script: str | None
    options: type[Any]
    module: str
    function: str
    arguments: tuple[str, ...] = ()
    first: str | None = None

    def __call__(self, options: Any, console: Console) -> None:
        """Runs the command."""
        getattr(importlib.import_module(self.module), self.function)(options, console)


COMMANDS = {
    "preprocess": Command(
        "preprocess.py", PreprocessOptions, "kiem.data.prepare.preprocess", "preprocess"
    ),
    "train": Command("training.py", TrainingOptions, "kiem.training.loop", "train"),
    "ladder": Command(None, LadderOptions, "kiem.ladder.climb", "ladder"),
    "generate": Command("inference.py", InferenceOptions, "kiem.inference.generate", "generate"),
    "serve": Command(
        "inference.py", InferenceOptions, "kiem.inference.generate", "generate", ("--serve",)
    ),
    "evaluate": Command("evaluate.py", EvaluationOptions, "kiem.evaluation.command", "evaluate"),
    "export": Command("export.py", ExportOptions, "kiem.export.export", "export"),
    "report": Command("report.py", ReportOptions, "kiem.report.page", "report"),
    "audit": Command(None, AuditOptions, "kiem.audit.command", "audit", first="--run"),
    "look": Command(None, LookOptions, "kiem.look.command", "look", first="--directory"),
}


def main() -> int:
    """Runs the command that the command line names and returns its exit code."""
    name, *words = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        return report_errors(lambda console: _list_commands(name, console))
    command = COMMANDS[name]
    if command.first and words and not words[0].startswith("-"):
        words = [command.first, *words]
    return run(command.options, f"kiem {name}", command, [*command.arguments, *words])


def _list_commands(word: str, console: Console) -> None:
    if word not in ("-h", "--help"):
        raise bad_option(word, "no such command", f"The commands are: {', '.join(COMMANDS)}.")
    lines = ["usage: kiem COMMAND [options]; kiem COMMAND --help lists the options"]
    for name, command in COMMANDS.items():
        does = " ".join(str(command.options.__doc__).split())
        script = f" ({' '.join([command.script, *command.arguments])})" if command.script else ""
        lines.append(f"  {name:10} {does}{script}")
    show(console, "\n".join(lines) + "\n")
