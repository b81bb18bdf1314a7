"""docs/reference.md, made from the dataclasses in config.py: `python -m kiem.reference > FILE`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from kiem.commands import COMMANDS
from kiem.core.values import OptionType, describe_limits, option_types

_HEAD = """# Reference

Made from kiem/config.py by `make reference`; change it there. Exit codes:
[troubleshooting.md](troubleshooting.md). Completion of commands and options:
`source <(kiem --tyro-print-completion bash)`; in zsh, `kiem --tyro-write-completion zsh
~/.zfunc/_kiem`, with that folder in `fpath`.

## On the command line

A flag is turned on by its name and off by `--no-` and its name. Options with `...` take several
values, one after the other (`--source a b`) or with the name repeated (`--source a --source b`). Of
any other option that is repeated the last value counts. Numbers are decimal: `0.001`, `1e-3`,
`1_000_000`. A value that begins with a dash follows an equals sign: `--stop=--`.

## In a file

`--config FILE` reads options from YAML, such as the `config.yaml` that every run leaves:

```yaml
source: [my_texts, more_texts]
tokenizer: train:16384
near_duplicates: true
name: 2024_01_01
```

The command line takes precedence; a list there replaces the list in the file. A value means what
the same text means on the command line, whatever else YAML makes of it: this `name` is text,
`language: no` is Norwegian, and `seed: 017` is 17. Flags are `true` or `false`, `yes` or `no`, `on`
or `off`. `null`, `~` and nothing at all mean that the option is not given; quote them if they are
text. An unknown option, or the same option twice, is an error.
"""


_WORDS = {str: "text", int: "whole number", float: "number", bool: "flag", Path: "path"}


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
    types, meanings = option_types(options), _meanings(options)
    for field in dataclasses.fields(options):
        is_required = field.default is dataclasses.MISSING
        yield (
            f"`--{field.name.replace('_', '-')}`",
            _values(types[field.name]),
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


def _values(kind: OptionType) -> str:
    """Returns an option's values as people write them."""
    if kind.choices:
        words = ", ".join(f"`{choice}`" for choice in kind.choices)
    else:
        limits = f" {describe_limits(kind.limits)}" if kind.limits else ""
        words = f"{_WORDS[kind.base]}{limits}"
    return f"{words} ..." if kind.is_list else words


def _default(value: Any) -> str:
    if value is None:
        return ""
    words = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    print(reference(), end="")
