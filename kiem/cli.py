"""From command line to options, and from errors to messages and exit codes."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from rich.console import Console

from kiem.errors import ExitCode, UserError

Options = TypeVar("Options")


def parse(options_class: type[Options], arguments: Sequence[str], program: str) -> Options:
    """Returns the options of a command line.

    Values come from the command line, else from the YAML file of `--config`, else from the defaults
    in the dataclass.

    Args:
        options_class: one of the dataclasses in kiem.config.
        arguments: the command line without the program's name.
        program: the script's name, for the help text.

    Raises:
        UserError: the configuration file is missing or has an unknown option.
        SystemExit: with 2, after a message, when the command line is wrong; with 0 after --help.
    """
    arguments = list(arguments)
    config = _take_config(arguments)
    from_file = _read_config(options_class, config) if config else []
    parsed: Options = tyro.cli(
        options_class,
        args=[*from_file, *arguments],
        prog=program,
        config=(tyro.conf.AvoidSubcommands,),
        description=f"{options_class.__doc__}\n\n--config FILE: options as YAML, as in a run's "
        "config.yaml; the command line goes first.",
    )
    return parsed


def run(
    options_class: type[Options],
    program: str,
    main: Callable[[Options, Console], Any],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses the command line, runs a script's main function and returns its exit code.

    A `UserError` becomes one message on standard error; Ctrl-C stops quietly. Of several processes
    on a machine only the first one speaks.

    Args:
        options_class: one of the dataclasses in kiem.config.
        program: the script's name, for the help text.
        main: what to call with the options and a console.
        arguments: the command line without the program's name. Default: this process's.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    console = Console(quiet=not is_first, highlight=False, soft_wrap=True)
    messages = Console(stderr=True, quiet=not is_first, highlight=False, soft_wrap=True)
    try:
        main(parse(options_class, arguments, program), console)
    except UserError as error:
        messages.print(f"error: {error}", markup=False)
        return int(error.exit_code)
    except KeyboardInterrupt:
        messages.print("stopped")
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def warn(console: Console, message: str) -> None:
    """Prints a warning: something a person should know but that stops nothing."""
    console.print(f"[yellow]warning:[/] {message}")


def check_name(name: str, option: str) -> str:
    """Returns `name` when it is safe as the name of one folder.

    Raises:
        UserError: it is empty, starts with a dot or dash, or has characters that paths dislike.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise UserError(
            f"{name!r} cannot be a folder name",
            where=option,
            fix="Use letters, digits, '.', '_', '+' and '-', beginning with a letter or digit.",
            exit_code=ExitCode.BAD_OPTION,
        )
    return name


def to_dict(options: Any) -> dict[str, Any]:
    """Returns options as plain values by name; unset ones are left out."""
    values: dict[str, Any] = {}
    for name, value in dataclasses.asdict(options).items():
        if isinstance(value, Path):
            values[name] = str(value)
        elif isinstance(value, tuple):
            values[name] = list(value)
        elif value is not None:
            values[name] = value
    return values


def to_yaml(options: Any) -> str:
    """Returns options as the YAML that `--config` reads back; unset ones are left out."""
    return yaml.safe_dump(to_dict(options), sort_keys=False, allow_unicode=True)


def _take_config(arguments: list[str]) -> Path | None:
    """Removes --config FILE from the arguments and returns the file."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            del arguments[index]
            return Path(argument.removeprefix("--config="))
        if argument == "--config" and index + 1 < len(arguments):
            del arguments[index]
            return Path(arguments.pop(index))
    return None


def _read_config(options_class: Any, path: Path) -> list[str]:
    """Returns a YAML file's options as command-line arguments, so that both are checked alike."""

    def bad(what: str, fix: str) -> UserError:
        return UserError(what, where=str(path), fix=fix, exit_code=ExitCode.BAD_OPTION)

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise bad(f"cannot be read ({error.strerror})", "Correct --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise bad(f"not YAML ({error})", "Write lines such as 'batch_size: 4'.") from error
    if not isinstance(values, dict):
        raise bad("not a list of options", "Write lines such as 'batch_size: 4'.")
    known = {entry.name for entry in dataclasses.fields(options_class)}
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise bad(f"no option {key!r}", f"The options are: {', '.join(sorted(known))}.")
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            arguments += [f"--{option}", *map(str, value)]
        elif value is not None:
            arguments += [f"--{option}", str(value)]
    return arguments
