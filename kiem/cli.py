"""Command lines of the scripts: from arguments to options, from errors to exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from kiem.core.console import PlainConsole, open_output, show, warn
from kiem.core.disk import DiskWarning
from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.core.values import OptionType, option_flags, option_rows, option_types
from kiem.parallel.launch import prints_output

Options = TypeVar("Options")
_CONFIG_HELP = (
    "Options as YAML, as in a run's config.yaml. What is given on the command line, lists "
    "included, replaces what the file says."
)


def parse(options_class: type[Options], arguments: Sequence[str], program: str) -> Options:
    """Returns the options of a command line.

    Values come from the command line, else from the YAML file of `--config`, else from the defaults
    in the dataclass.

    Args:
        options_class: a dataclass, such as those in kiem.config.
        arguments: the command line without the program's name.
        program: the script's name, for the help text.

    Raises:
        UserError: an option or its value is missing or not possible, or the file has a mistake.
        SystemExit: with 0 after --help.
    """
    if {"-h", "--help"} & {*arguments}:
        show(PlainConsole(), _help(options_class, program))
        raise SystemExit(0)
    kinds = option_types(options_class)
    values = {
        field.name: field.default
        for field in dataclasses.fields(options_class)  # type: ignore[arg-type]
        if field.default is not dataclasses.MISSING
    }
    given = _read_words(arguments, kinds | {"config": OptionType(Path)}, program)
    if file := given.pop("config", None):
        from kiem.core.yaml_options import read_options  # most runs need no YAML

        values |= read_options(options_class, file)
    for name, kind in kinds.items():
        is_pointless = given.get(name) == values.get(name) == ()
        has_too_few = kind.is_list and len(given.get(name, values.get(name, ()))) < kind.min_length
        if name not in values | given or has_too_few or is_pointless:
            fix = f"Give {kind.describe()}{', or leave it out' if name in values else ''}."
            raise bad_option(option_flags(name, kind)[0], "no value is given", fix)
    return options_class(**values | given)


def _read_words(words: Sequence[str], kinds: dict[str, OptionType], program: str) -> dict[str, Any]:
    """Returns the values that a command line gives, by option.

    A word that begins with "--" is an option; the words up to the next one, or what stands behind
    its "=", are its values.
    """
    known = {flag: name for name, kind in kinds.items() for flag in option_flags(name, kind)}
    grouped: list[tuple[str, list[str]]] = []
    for word in words:
        if grouped and not word.startswith("--"):
            grouped[-1][1].append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag not in known:
            similar = difflib.get_close_matches(flag, known, n=1)
            fix = f"Did you mean {similar[0]}?" if similar else f"See {program} --help."
            raise bad_option(word, f"{program} has no such option", fix)
        grouped.append((flag, [value] if equals else []))
    given: dict[str, Any] = {}
    for flag, texts in grouped:
        name = known[flag]
        kind = kinds[name]
        if kind.base is bool:
            if texts:
                fix = f"Write {' or '.join(option_flags(name, kind))}."
                raise bad_option(flag, "takes no value", fix)
            given[name] = not flag.startswith("--no-")
        elif kind.is_list:
            given[name] = (*given.get(name, ()), *(kind.read(text, flag) for text in texts))
        elif len(texts) == 1:
            given[name] = kind.read(texts[0], flag)
        else:
            what = f"{len(texts)} values are given" if texts else "no value is given"
            raise bad_option(flag, what, f"Give {kind.describe()}, in quotes if it has spaces.")
    return given


def _help(options_class: type[Any], program: str) -> str:
    width = min(100, max(40, shutil.get_terminal_size().columns))
    wrap = partial(textwrap.fill, width=width, break_on_hyphens=False)
    lines = [f"usage: {program} [options]", "", wrap(" ".join(str(options_class.__doc__).split()))]
    rows = [
        *option_rows(options_class),
        (["--config"], "a path", "", _CONFIG_HELP),
        (["-h", "--help"], "flag", "", "Show this help."),
    ]
    for flags, values, default, meaning in rows:
        head = f"{', '.join(flags)}: {values}"
        if default:
            head += f" ({'' if default == 'required' else 'default: '}{default})"
        lines += ["", wrap(head, initial_indent="  ", subsequent_indent="    ")]
        lines.append(wrap(meaning, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines) + "\n"


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
    process, show_others = os.getpid(), warnings.showwarning

    def show_plainly(
        message: Warning | str, category: type[Warning], *place: Any, **rest: Any
    ) -> None:
        if not issubclass(category, DiskWarning):
            show_others(message, category, *place, **rest)
        elif os.getpid() == process:
            warn(console, str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", DiskWarning)
        warnings.showwarning = show_plainly
        yield
