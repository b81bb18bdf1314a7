"""From command line to options, and from errors to messages and exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import tyro
from rich.console import Console
from tyro.constructors import PrimitiveConstructorSpec

from kiem.core.console import PlainConsole, open_output, warn
from kiem.core.disk import DiskWarning
from kiem.core.errors import ExitCode, UserError
from kiem.core.values import OptionType, describe_limits, is_boolean, option_types
from kiem.core.yaml_options import read_options
from kiem.parallel.launch import prints_output

Options = TypeVar("Options")
_FEWEST_COLUMNS = 40  # for help; in fewer than 6 tyro never ends
_SHELLS = ("bash", "zsh", "tcsh", "fish")

_METAVARS = {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}
_CONFIG_HELP = (
    "Options as YAML, as in a run's config.yaml. What is given on the command line, lists "
    "included, replaces what the file says."
)


def parse(options_class: type[Options], arguments: Sequence[str], program: str) -> Options:
    """Returns the options of a command line.

    Values come from the command line, else from the YAML file of `--config`, else from the defaults
    in the dataclass.

    Args:
        options_class: one of the dataclasses in kiem.config.
        arguments: the command line without the program's name.
        program: the script's name, for the help text.

    Raises:
        UserError: a value is not possible, or there is something wrong with the YAML file.
        SystemExit: with 2, after a message, when the command line is wrong; with 0 after --help.
    """
    arguments, config = _take_config(arguments)
    defaults = _defaults(options_class)
    if config is not None:
        defaults |= read_options(options_class, config)
    _refuse_values_of_flags(arguments, option_types(options_class))
    with around_tyro(arguments):
        parsed = tyro.cli(
            command_line(options_class, defaults),
            args=arguments,
            prog=program,
            config=(tyro.conf.AvoidSubcommands,),
        )
    values = {}
    for name, kind in option_types(options_class).items():
        value = getattr(parsed, name)
        values[name] = _list(name, kind, value, defaults.get(name)) if kind.is_list else value
    return options_class(**values)


def command_line(options_class: type[Any], defaults: dict[str, Any] | None = None) -> type[Any]:
    """Returns the dataclass that tyro makes a command line from.

    It differs from the options in this: kiem.core.values reads the texts; a list is a list of
    lists, one for each time that its option is given; there is `--config`, which `parse` takes
    out before.

    Args:
        options_class: one of the dataclasses in kiem.config.
        defaults: values by name; without one an option is required. None: those of the dataclass.
    """
    defaults = _defaults(options_class) if defaults is None else defaults
    fields: list[tuple[str, Any, Any]] = []
    for name, kind in option_types(options_class).items():
        is_optional = name in defaults and defaults[name] is None
        hint: Any = kind.base | None if is_optional else kind.base
        if kind.base is not bool:
            hint = Annotated[hint, _reader(name, kind)]
        default = dataclasses.field()
        if kind.is_list:
            hint = tyro.conf.UseAppendAction[tuple[tuple[hint, ...], ...]]
            default = dataclasses.field(default=())
        elif name in defaults:
            default = dataclasses.field(default=defaults[name])
        shown = _hint(kind, defaults[name]) if name in defaults else "(required)"
        fields.append((name, Annotated[hint, tyro.conf.arg(help_behavior_hint=shown)], default))
    config = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=_CONFIG_HELP)]
    fields.append(("config", config, dataclasses.field(default=None)))
    return dataclasses.make_dataclass(
        options_class.__name__,
        fields,
        bases=(options_class,),  # which has the help texts
        namespace={"__doc__": options_class.__doc__},
        frozen=True,
        kw_only=True,  # those with a default may come first
    )


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
        pass  # the reader of our text, such as `head`, has what it wanted
    except OSError as error:  # a path that the system refuses even to look at
        if not isinstance(error.filename, str):
            raise
        what = f"error: {error.filename}: {error.strerror}"
        messages.print(f"{what}\n  Correct this path, or who may use its folders.")
        return int(ExitCode.NOT_FOUND)
    return 0


@contextlib.contextmanager
def around_tyro(arguments: Sequence[str]) -> Iterator[None]:
    """Keeps from tyro what it has no message for: an unknown shell, a terminal of few columns.

    Raises:
        UserError: completion is asked for a shell that has none.
    """
    is_completion = "".join(arguments[:1]).startswith(("--tyro-print-", "--tyro-write-"))
    if is_completion and (len(arguments) < 2 or arguments[1] not in _SHELLS):
        raise UserError(
            "no shell is named that has completion",
            where=arguments[0],
            fix=f"Give one of {', '.join(_SHELLS)}.",
            exit_code=ExitCode.BAD_OPTION,
        )
    before = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < _FEWEST_COLUMNS:
        os.environ["COLUMNS"] = str(_FEWEST_COLUMNS)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


@contextlib.contextmanager
def _disk_warnings(console: Console) -> Iterator[None]:
    """Shows what the disk cannot do as the program's other warnings; forked workers say nothing."""
    process, show = os.getpid(), warnings.showwarning

    def show_plainly(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, DiskWarning):
            show(message, category, filename, lineno, file, line)
        elif os.getpid() == process:
            warn(console, str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", DiskWarning)
        warnings.showwarning = show_plainly
        yield


def _take_config(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Returns the arguments without --config FILE, and the file.

    Raises:
        UserError: the file is missing, or there are two.
    """

    def bad(what: str, fix: str) -> UserError:
        return UserError(what, where="--config", fix=fix, exit_code=ExitCode.BAD_OPTION)

    rest: list[str] = []
    files: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, file = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        if not equals:
            file = next(words, "")
        if not file or (file.startswith("-") and not equals):
            raise bad("no file is named", "Write --config FILE.")
        files.append(file)
    if len(files) > 1:
        raise bad(f"{len(files)} files are named", "Put their lines into one file.")
    return rest, OptionType(Path).read(files[0], "--config") if files else None


def _refuse_values_of_flags(arguments: Sequence[str], kinds: dict[str, OptionType]) -> None:
    """Names the option of which tyro would only say that "False" is unrecognized.

    Raises:
        UserError: a flag has a value.
    """
    flags = {_flag(name) for name, kind in kinds.items() if kind.base is bool}
    for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
        written, equals, _ = word.partition("=")
        flag = "--" + written.replace("_", "-").removeprefix("--").removeprefix("no-")
        if word.startswith("--") and flag in flags and (equals or is_boolean(following)):
            raise UserError(
                "takes no value",
                where=written,
                fix=f"Write {flag} or --no-{flag[2:]}.",
                exit_code=ExitCode.BAD_OPTION,
            )


def _defaults(options_class: type[Any]) -> dict[str, Any]:
    """Returns the defaults by name of the options that have one."""
    return {
        field.name: field.default
        for field in dataclasses.fields(options_class)
        if field.default is not dataclasses.MISSING
    }


def _reader(name: str, kind: OptionType) -> PrimitiveConstructorSpec[Any]:
    """Returns what makes tyro leave the reading of a text to kiem.core.values."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(kind.choices)}}}" if kind.choices else _METAVARS[kind.base],
        instance_from_str=lambda texts: kind.read(texts[0], _flag(name)),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
        choices=kind.choices or None,
    )


def _hint(kind: OptionType, default: Any) -> str:
    """Returns what stands behind the help of an option: its limits and default."""
    shown = shlex.join(map(str, default)) if isinstance(default, tuple) else str(default)
    limits = f"{describe_limits(kind.limits)}; " if kind.limits else ""
    return f"({limits}default: {shown})"


def _list(
    name: str, kind: OptionType, given: tuple[tuple[Any, ...], ...], default: tuple[Any, ...] | None
) -> tuple[Any, ...]:
    """Returns the value of a list option.

    Args:
        name, kind: of the option.
        given: the values of each time that it is given.
        default: its value when it is not given; None: it is required.

    Raises:
        UserError: it needs a value and has none, or its having none changes nothing.
    """
    value = tuple(item for items in given for item in items) if given else default
    is_pointless = given and value == default == ()
    if value is not None and len(value) >= kind.min_length and not is_pointless:
        return value
    fix = f"Give {kind.describe()}" + (", or leave it out." if default is not None else ".")
    raise UserError("no value is given", where=_flag(name), fix=fix, exit_code=ExitCode.BAD_OPTION)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
