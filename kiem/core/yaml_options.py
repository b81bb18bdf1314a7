"""YAML files of options, which `--config` reads and every run writes.

A scalar is the text that the file has; the option's type gives its value. YAML's own rules, to
which `no` is false, 1.10 a number and 017 fifteen, do not apply.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kiem.core.errors import bad_option
from kiem.core.values import OptionType, option_types

_UNSET = ("", "~", "null", "Null", "NULL")


def read_options(options_class: type[Any], path: Path) -> dict[str, Any]:
    """Returns the options that a YAML file sets, by name; those that are null are left out.

    Raises:
        UserError: the file is no mapping from options to their values; names the line.
    """
    known = option_types(options_class)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, node in _entries(path):
        line = key.start_mark.line + 1
        where = f"{path}:{line}"
        written = _text(key, where)
        name = written.replace("-", "_")
        if name not in known:
            fix = f"The options are: {', '.join(known)}."
            raise bad_option(where, f"no option {written!r}", fix)
        if name in lines:
            what = f"{written} stands in line {lines[name]} already"
            raise bad_option(where, what, "Remove one of the two.")
        lines[name] = line
        if not _is_unset(node):
            values[name] = _value(known[name], node, path, written)
    return values


def to_yaml(options: Any) -> str:
    """Returns options as the YAML that `read_options` reads back; unset ones are left out."""
    values = to_dict(options)
    # YAML would fold U+0085 and its like into spaces: then all but ASCII is escaped.
    is_plain = json.dumps(values, ensure_ascii=False).isprintable()
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=is_plain, width=float("inf"))


def to_dict(options: Any) -> dict[str, Any]:
    """Returns options as plain values by name; unset ones are left out."""
    values = msgspec.to_builtins(options, enc_hook=str)  # for paths
    return {name: value for name, value in values.items() if value is not None}


def _value(kind: OptionType, node: yaml.Node, path: Path, option: str) -> Any:
    """Returns the value that a node stands for."""
    where = f"{path}:{node.start_mark.line + 1}: {option}"
    if not kind.is_list:
        return kind.read(_text(node, where), where)
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if len(items) < kind.min_length:
        raise bad_option(where, "the list is empty", f"Give at least {kind.min_length}.")
    values = []
    for item in items:
        where = f"{path}:{item.start_mark.line + 1}: {option}"
        if _is_unset(item):
            fix = "Give one; put the word null and empty text in quotes."
            raise bad_option(where, "an item has no value", fix)
        values.append(kind.read(_text(item, where), where))
    return tuple(values)


def _text(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        fix = "Give one value, in quotes if it has brackets or a colon."
        raise bad_option(where, f"{what} is not possible here", fix)
    return node.value


def _is_unset(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _UNSET


def _entries(path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    """Returns keys and values of a file's mapping, as nodes, which know their line."""
    fix = "Write UTF-8 text, in lines such as 'batch_size: 4'."
    try:
        # BaseLoader reads every scalar as text.
        root = yaml.compose(path.read_bytes(), Loader=yaml.BaseLoader)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise bad_option(str(path), what, "Correct --config.") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise bad_option(where, f"not YAML ({reason})", fix) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise bad_option(str(path), "no options by name", fix)
    return list(root.value)
