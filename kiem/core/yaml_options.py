"""YAML files of options, which `--config` reads and every run writes.

A scalar is the text that the file has; the option's type gives its value. YAML's own rules, to
which `no` is false, 1.10 a number and 017 fifteen, do not apply.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from kiem.core.errors import bad_option
from kiem.core.values import OptionType, option_types

_MOST_BYTES = 1 << 20
_UNSET = ("", "~", "null", "Null", "NULL")


class _Dumper(yaml.SafeDumper):
    """Writes text on one line: YAML folds line breaks into spaces, also U+0085 and its like."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        node = super().represent_str(data)
        if not data.isprintable():
            node.style = '"'
        return node


_Dumper.add_representer(str, _Dumper.represent_str)


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
    return yaml.dump(
        to_dict(options), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")
    )


def to_dict(options: Any) -> dict[str, Any]:
    """Returns options as plain values by name; unset ones are left out."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    return {
        name: list(map(plain, value)) if isinstance(value, tuple) else plain(value)
        for name, value in dataclasses.asdict(options).items()
        if value is not None
    }


def _value(kind: OptionType, node: yaml.Node, path: Path, option: str) -> Any:
    """Returns the value that a node stands for."""
    where = f"{path}:{node.start_mark.line + 1}: {option}"
    if not kind.is_list:
        return kind.read(_text(node, where), where)
    _refuse_tag(node, where)
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
    _refuse_tag(node, where)
    if not isinstance(node, yaml.ScalarNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        fix = "Give one value, in quotes if it has brackets or a colon."
        raise bad_option(where, f"{what} is not possible here", fix)
    return node.value


def _refuse_tag(node: yaml.Node, where: str) -> None:
    if node.tag.removeprefix("tag:yaml.org,2002:") not in ("str", "seq", "map"):
        fix = "Remove it: the option says what kind of value it is."
        raise bad_option(where, f"the tag {node.tag} is not read", fix)


def _is_unset(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _UNSET


def _entries(path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    """Returns keys and values of a file's mapping, as nodes, which know their line."""
    fix = "Write lines such as 'batch_size: 4'."
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise bad_option(str(path), f"larger than {_MOST_BYTES:,} bytes", "Correct --config.")
        # BaseLoader reads every scalar as text.
        root = yaml.compose(data.decode("utf-8-sig"), Loader=yaml.BaseLoader)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise bad_option(str(path), what, "Correct --config.") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise bad_option(f"{path}:{line}", "not UTF-8", "Save the file as UTF-8 text.") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise bad_option(f"{path}:{line}", f"not YAML ({error.problem})", fix) from error
    except yaml.YAMLError as error:  # a character that YAML does not have
        reason = str(error).splitlines()[0]
        raise bad_option(str(path), f"not YAML ({reason})", fix) from error
    except RecursionError as error:
        raise bad_option(str(path), "nested too deeply", fix) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise bad_option(str(path), "no options by name", fix)
    _refuse_tag(root, str(path))
    return list(root.value)
