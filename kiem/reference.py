"""Generator of docs/reference.md from kiem/config.py: `python -m kiem.reference > FILE`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from kiem.commands import COMMANDS
from kiem.core.values import OptionType, option_flag, option_help, option_types

_HEAD = """# Reference

Made from kiem/config.py by `make reference`; change it there. Exit codes:
[troubleshooting.md](troubleshooting.md). Completion of commands and options in bash:
`source <(kiem --print-completion)`; in zsh the same after `autoload -U +X bashcompinit &&
bashcompinit`.

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


def reference() -> str:
    """Returns the page: every command with every option, its values, default and meaning."""
    lines = [_HEAD]
    for name, command in COMMANDS.items():
        if command.arguments:
            script = " ".join([command.script, *command.arguments])
            lines += [f"## kiem {name}, {script}", "", f"Options as of {command.script}.", ""]
            continue
        does = " ".join(str(command.options.__doc__).split())
        lines += [f"## kiem {name}, {command.script}", "", does, ""]
        lines += ["| option | values | default | |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in _rows(command.options)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _rows(options: type[Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yields name, values, default and meaning of each option."""
    types, meanings = option_types(options), option_help(options)
    for field in dataclasses.fields(options):
        is_required = field.default is dataclasses.MISSING
        yield (
            f"`{option_flag(field.name)}`",
            _values(types[field.name]),
            "required" if is_required else _default(field.default),
            meanings[field.name].replace("|", "\\|"),
        )


def _values(kind: OptionType) -> str:
    """Returns what an option takes, such as `a`, `b` ... or whole number from 1 to 8."""
    words = ", ".join(f"`{choice}`" for choice in kind.choices)
    words = words or ("flag" if kind.base is bool else kind.describe().removeprefix("a "))
    return f"{words} ..." if kind.is_list else words


def _default(value: Any) -> str:
    if value is None:
        return ""
    words = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    print(reference(), end="")
