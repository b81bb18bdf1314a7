"""docs/reference.md, made from the dataclasses in config.py: `python -m kiem.reference > FILE`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from kiem.commands import COMMANDS

_HEAD = """# Reference

Made from kiem/config.py by `make reference`; change it there. `--config FILE` reads options from
YAML; the command line goes first. An option whose default is `True` or `False` is turned on by its
name and off by `--no-` and its name. Exit codes: [troubleshooting.md](troubleshooting.md).

Completion of commands and options: `source <(kiem --tyro-print-completion bash)`; in zsh,
`kiem --tyro-write-completion zsh ~/.zfunc/_kiem`, with that folder in `fpath`.
"""


_TYPES = {str: "text", int: "whole number", float: "number", bool: "flag", Path: "path"}


def reference() -> str:
    """Returns the page: every command with every option, its values, default and meaning."""
    lines = [_HEAD]
    for name, command in COMMANDS.items():
        if command.arguments:
            script = " ".join([command.script, *command.arguments])
            lines += [f"## kiem {name}, {script}", "", f"Options as of {command.script}.", ""]
            continue
        lines += [f"## kiem {name}, {command.script}", "", f"{command.options.__doc__}", ""]
        lines += ["| option | values | default | |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in _rows(command.options)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _rows(options: type[Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yields name, values, default and meaning of each option."""
    hints, meanings = typing.get_type_hints(options), _meanings(options)
    for field in dataclasses.fields(options):
        is_required = field.default is dataclasses.MISSING
        yield (
            f"`--{field.name.replace('_', '-')}`",
            _values(hints[field.name]),
            "required" if is_required else _default(field.default),
            meanings[field.name].replace("|", "\\|"),
        )


def _meanings(options: type[Any]) -> dict[str, str]:
    """Returns the string below each field: Python keeps it nowhere but in the source."""
    described = ast.parse(inspect.getsource(options)).body[0]
    assert isinstance(described, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(below.value).split())
        for field, below in pairwise(described.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _values(hint: Any) -> str:
    """Returns an option's type as people write it."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):  # Optional[Literal] is of the second kind
        return _values(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        return f"{_values(arguments[0])} ..."
    return _TYPES[hint]


def _default(value: Any) -> str:
    if value is None:
        return ""
    words = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    print(reference(), end="")
