"""Command lines of the scripts: from arguments to options, from errors to exit codes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from kiem.core.console import PlainConsole, open_output, warn
from kiem.core.disk import DiskWarning
from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.core.values import OptionType, describe_limits, option_flag, option_help, option_types
from kiem.core.yaml_options import read_options
from kiem.parallel.launch import prints_output

Options = TypeVar("Options")
_METAVARS = {str: "TEXT", int: "INT", float: "FLOAT", Path: "PATH"}
_CONFIG_HELP = (
    "Options as YAML, as in a run's config.yaml. What is given on the command line, lists "
    "included, replaces what the file says."
)
_VALUE = "\0"  # begins a value that is no option, whatever it looks like; no argument has it


class _Flag(argparse.Action):
    """`--x` and `--no-x`."""

    def __call__(
        self,
        _: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        written = str(option_string)
        if values is not None:
            fix = f"Write {' or '.join(self.option_strings)}."
            raise bad_option(written, "takes no value", fix)
        setattr(namespace, self.dest, not written.startswith("--no-"))


class _Formatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Flag):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


def parse(options_class: type[Options], arguments: Sequence[str], program: str) -> Options:
    """Returns the options of a command line.

    Values come from the command line, else from the YAML file of `--config`, else from the defaults
    in the dataclass.

    Args:
        options_class: a dataclass, such as those in kiem.config.
        arguments: the command line without the program's name.
        program: the script's name, for the help text.

    Raises:
        UserError: an option or its value is not possible, or the YAML file has a mistake.
        SystemExit: with 2, after a message, when a value is missing; with 0 after --help.
    """
    kinds = option_types(options_class)
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(options_class)  # type: ignore[arg-type]
        if field.default is not dataclasses.MISSING
    }
    parser = _parser(options_class, program, kinds, defaults)
    known = ["--config", *(flag for name, kind in kinds.items() for flag in flags(name, kind))]
    namespace, unknown = parser.parse_known_args(list(_mark_values(arguments, known)))
    if unknown:
        similar = difflib.get_close_matches(unknown[0], known, n=1)
        fix = f"Did you mean {similar[0]}?" if similar else f"See {program} --help."
        raise bad_option(unknown[0], f"{program} has no such option", fix)
    given = vars(namespace)
    if files := given.pop("config", None):
        defaults |= read_options(options_class, _one_file(files))
    values = defaults | given
    for name, kind in kinds.items():
        if kind.is_list and name in given:
            values[name] = tuple(given[name])
        value = values.get(name, ())
        is_pointless = name in given and value == defaults.get(name) == ()
        is_missing = name not in values or (kind.is_list and len(value) < kind.min_length)
        if is_missing or is_pointless:
            fix = f"Give {kind.describe()}{', or leave it out' if name in defaults else ''}."
            raise bad_option(option_flag(name), "no value is given", fix)
    return options_class(**values)


def _parser(
    options_class: type[Any], program: str, kinds: dict[str, OptionType], defaults: dict[str, Any]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        usage="%(prog)s [options]",
        description=options_class.__doc__,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    texts = option_help(options_class)
    for name, kind in kinds.items():
        flag = option_flag(name)
        hint = _hint(kind, defaults[name]) if name in defaults else "(required)"
        text = f"{texts.get(name, '')} {hint}".replace("%", "%%")
        if kind.base is bool:
            parser.add_argument(*flags(name, kind), action=_Flag, nargs="?", help=text)
            continue
        parser.add_argument(
            flag,
            action="extend" if kind.is_list else "store",
            nargs="*" if kind.is_list else None,
            type=partial(_read, kind, flag),
            metavar=f"{{{','.join(kind.choices)}}}" if kind.choices else _METAVARS[kind.base],
            help=text,
        )
    parser.add_argument(
        "--config", action="append", nargs="?", const="", metavar="FILE", help=_CONFIG_HELP
    )
    return parser


def _read(kind: OptionType, flag: str, word: str) -> Any:
    return kind.read(word.removeprefix(_VALUE), flag)


def flags(name: str, kind: OptionType) -> list[str]:
    """Returns the ways in which an option is written on the command line."""
    flag = option_flag(name)
    return [flag, f"--no-{flag[2:]}"] if kind.base is bool else [flag]


def _mark_values(arguments: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """Separates options from values behind "=", and takes `--a_b` for `--a-b`."""
    for word in arguments:
        written, equals, value = word.partition("=")
        flag = written.replace("_", "-")
        yield flag if flag in known else word
        if flag in known and equals:
            yield _VALUE + value


def _one_file(files: Sequence[str]) -> Path:
    names = [name.removeprefix(_VALUE) for name in files]
    if not all(names):
        raise bad_option("--config", "no file is named", "Write --config FILE.")
    if len(names) > 1:
        fix = "Put their lines into one file."
        raise bad_option("--config", f"{len(names)} files are named", fix)
    OptionType(Path).read(names[0], "--config")
    return Path(names[0])


def _hint(kind: OptionType, default: Any) -> str:
    """Returns what follows the help of an option: its limits and default."""
    words = [describe_limits(kind.limits)] if kind.limits else []
    if kind.base is bool:
        words.append(f"default: {'on' if default else 'off'}")
    elif isinstance(default, tuple):
        words.append(f"default: {shlex.join(map(str, default)) or 'none'}")
    elif default is not None:
        words.append(f"default: {default}")
    return f"({'; '.join(words)})" if words else ""


def run(
    options_class: type[Options],
    program: str,
    main: Callable[[Options, Console], Any],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses the command line, runs a script's main function and returns its exit code.

    A `UserError` becomes one message on standard error; Ctrl-C stops quietly. Of several processes
    on a machine only the first one prints.

    Args:
        options_class: one of the dataclasses in kiem.config.
        program: the script's name, for the help text.
        main: what to call with the options and a console.
        arguments: the command line without the program's name. Default: this process's.
    """
    words = sys.argv[1:] if arguments is None else arguments
    return report_errors(lambda console: main(parse(options_class, words, program), console))


def report_errors(work: Callable[[Console], Any]) -> int:
    """Calls `work` with a console and returns the exit code, after a message if it fails."""
    open_output()
    is_main = prints_output()
    console = PlainConsole(quiet=not is_main)
    messages = PlainConsole(stderr=True, quiet=not is_main)
    try:
        with _disk_warnings(console):
            work(console)
    except UserError as error:
        messages.print(f"error: {error}")
        return int(error.exit_code)
    except KeyboardInterrupt:
        messages.print("stopped")
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        pass  # the reader of the output, such as `head`, has what it wanted
    except OSError as error:  # a path that the system refuses even to look at
        if not isinstance(error.filename, str):
            raise
        what = f"error: {error.filename}: {error.strerror}"
        messages.print(f"{what}\n  Correct this path, or the permissions of its folders.")
        return int(ExitCode.NOT_FOUND)
    return 0


@contextlib.contextmanager
def _disk_warnings(console: Console) -> Iterator[None]:
    """Prints disk warnings as the program's own; forked workers print none."""
    process, show = os.getpid(), warnings.showwarning

    def show_plainly(
        message: Warning | str, category: type[Warning], *place: Any, **rest: Any
    ) -> None:
        if not issubclass(category, DiskWarning):
            show(message, category, *place, **rest)
        elif os.getpid() == process:
            warn(console, str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", DiskWarning)
        warnings.showwarning = show_plainly
        yield
