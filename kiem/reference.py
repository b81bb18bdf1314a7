"""Generator of docs/reference.md from kiem/config/: `python -m kiem.reference > FILE`."""

from __future__ import annotations

from kiem.commands import COMMANDS
from kiem.core.values import option_rows

_HEAD = """# Reference

Made from kiem/config/ by `make reference`; change it there. Exit codes:
[troubleshooting.md](troubleshooting.md).

## On the command line

A flag is turned on by its name and off by `--no-` and its name. Options with `...` take several
values, one after the other (`--source a b`) or with the name repeated (`--source a --source b`). Of
any other option that is repeated the last value counts. Numbers are decimal: `0.001`, `1e-3`,
`1_000_000`. A value that begins with two dashes follows an equals sign: `--stop=--`.

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
            script = " ".join([str(command.script), *command.arguments])
            lines += [f"## kiem {name}, {script}", "", f"Options as of {command.script}.", ""]
            continue
        does = " ".join(str(command.options.__doc__).split())
        title = f"## kiem {name}, {command.script}" if command.script else f"## kiem {name}"
        lines += [title, "", does, ""]
        lines += ["| option | values | default | |", "|---|---|---|---|"]
        for flags, values, default, meaning in option_rows(command.options):
            shown = f"`{default}`" if default not in ("", "required") else default
            cells = [f"`{flags[0]}`", values, shown, meaning.replace("|", "\\|")]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")
