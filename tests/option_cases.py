"""The tables of test_options.py: every option, what it takes and what not, and whole files."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from kiem.commands import COMMANDS
from kiem.config import (
    AuditOptions,
    EvaluationOptions,
    ExportOptions,
    InferenceOptions,
    LadderOptions,
    LookOptions,
    PreprocessOptions,
    ReportOptions,
    TrainingOptions,
)
from kiem.core.values import OptionType, option_types

CLASSES = list(dict.fromkeys(command.options for command in COMMANDS.values()))
# What has no default.
REQUIRED = {
    TrainingOptions: ("--dataset-path", "x"),
    InferenceOptions: ("--model-path", "x"),
    EvaluationOptions: ("--model-path", "x"),
    ExportOptions: ("--model-path", "x", "--output", "x.gguf"),
    ReportOptions: ("--runs", "x"),
    AuditOptions: ("--run", "x"),
    LadderOptions: ("--dataset-path", "x"),
    LookOptions: ("--directory", "x"),
    PreprocessOptions: (),
}


def alone(options: type[Any], name: str) -> type[Any]:
    """Returns a dataclass that has one option of `options`, and is parsed ten times as fast."""
    hint = typing.get_type_hints(options, include_extras=True)[name]
    default = {field.name: field.default for field in dataclasses.fields(options)}[name]
    field: Any = dataclasses.field(default=default)
    return dataclasses.make_dataclass("Alone", [(name, hint, field)], frozen=True)


EACH_OPTION = [
    pytest.param(alone(options, name), name, kind, id=f"{options.__name__}-{name}")
    for options in CLASSES
    for name, kind in option_types(options).items()
]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', width=math.inf).strip()


def numbers_around(kind: OptionType) -> Iterator[str]:
    """Yields numbers that are just beyond the limits, and far beyond them."""
    limits = kind.limits
    assert limits is not None
    if kind.base is int:
        yield from (str(limits.ge - 1), str(limits.le + 1))
    else:
        yield repr(limits.gt if limits.ge is None else math.nextafter(limits.ge, -math.inf))
        yield repr(limits.lt if limits.le is None else math.nextafter(limits.le, math.inf))
    yield from ("-1e-999" if kind.base is int else "-1e-300", "1e999", "nan", "-inf", "inf")
    yield from (f"1{'0' * 30}", f"-1{'0' * 30}", "9" * 5000)


def impossible_texts(kind: OptionType) -> Iterator[str]:
    """Yields texts that stand for no value of an option."""
    yield "\ud800"
    if kind.base in (int, float):
        yield from ("", " ", "x", "0x10", "1,5", "1__0", "1:30", "true", ".inf", ".nan", "1e", "~")
        yield from numbers_around(kind)
    if kind.base is int:
        yield from ("1.0", "1e3", "1e-3")
    if kind.choices:
        yield from ("", "?", kind.choices[0] + " ", kind.choices[0].upper())
    if kind.base is bool:
        yield from ("maybe", "1", "0", "", "None", "truefalse")
    if kind.base is Path or not kind.may_be_empty:
        yield ""


def possible_texts(kind: OptionType) -> list[str]:
    """Returns texts at the ends of what an option takes."""
    if kind.limits is not None and kind.base is int:
        return [
            f"{kind.limits.ge}",
            f"0{kind.limits.ge}",
            f"+{kind.limits.le}",
            f"{kind.limits.le:_}",
        ]
    if kind.limits is not None:
        low = kind.limits.ge if kind.limits.gt is None else math.nextafter(kind.limits.gt, math.inf)
        high = kind.limits.le if kind.limits.lt is None else math.nextafter(kind.limits.lt, 0)
        return [repr(low), f"0{high!r}"]
    if kind.base is bool:
        return ["true", "No", "ON", "off"]
    odd = ["no", "1.10", "017", "2024_01_01", "1e3", "--serve", "a: b", "[x]", "12:30:45", "true"]
    return list(kind.choices) or [*odd, "None", "é # ĳ", "=", "- a", "'", '"', "%TAG", "&a *a"]


# What stands in a file for preprocess.py or training.py, and what it sets.
FILES: list[tuple[type[Any], str, dict[str, Any]]] = [
    (InferenceOptions, 'stop: ["</s>", "--serve"]', {"stop": ("</s>", "--serve")}),
    (TrainingOptions, 'sample_prompt: ["</s>", "--plan"]', {"sample_prompt": ("</s>", "--plan")}),
    (TrainingOptions, "sample_prompt:\n- --plan\n- no", {"sample_prompt": ("--plan", "no")}),
    (TrainingOptions, "sample_prompt: []", {"sample_prompt": ()}),
    (TrainingOptions, "run_name: 2024_01_01", {"run_name": "2024_01_01"}),
    (TrainingOptions, "run_name: 2024-01-01", {"run_name": "2024-01-01"}),
    (TrainingOptions, "run_name: 1.10", {"run_name": "1.10"}),
    (TrainingOptions, "run_name: 12:30", {"run_name": "12:30"}),
    (TrainingOptions, "run_name: .inf", {"run_name": ".inf"}),
    (TrainingOptions, "run_name: <<", {"run_name": "<<"}),
    (TrainingOptions, "run_name: a # b", {"run_name": "a"}),
    (TrainingOptions, "run_name: 'null'", {"run_name": "null"}),
    (TrainingOptions, "run_name: >-\n  a\n  b", {"run_name": "a b"}),
    (TrainingOptions, "run_name: !!str 017", {"run_name": "017"}),
    (TrainingOptions, "language: no", {"language": "no"}),
    (TrainingOptions, "language: null", {"language": "nl"}),
    (TrainingOptions, "resume: none", {"resume": "none"}),
    (TrainingOptions, "seed: 017", {"seed": 17}),
    (TrainingOptions, "seed: '8'", {"seed": 8}),
    (TrainingOptions, "epochs: 1e-3", {"epochs": 0.001}),
    (
        TrainingOptions,
        "use_wandb: YES\ndocument-mask: off",
        {"use_wandb": True, "document_mask": False},
    ),
    (TrainingOptions, "run-name: &n x\nlanguage: *n", {"run_name": "x", "language": "x"}),
    (TrainingOptions, "{seed: 3, epochs: 2}", {"seed": 3, "epochs": 2.0}),
    (TrainingOptions, '{"seed": 3, "run_name": "\\u00e9"}', {"seed": 3, "run_name": "é"}),
    (TrainingOptions, "\ufeff---\r\nseed: 3\r\n...\r\n", {"seed": 3}),
    (TrainingOptions, "%YAML 1.1\n---\nseed: 3", {"seed": 3}),
    (TrainingOptions, "", {}),
    (TrainingOptions, "# nothing\n", {}),
    (
        PreprocessOptions,
        "name: no\ndecontaminate: [a, 017]",
        {"name": "no", "decontaminate": (Path("a"), Path("017"))},
    ),
    (PreprocessOptions, "dataset_size: 1_000", {"dataset_size": "1_000"}),
]


BOMB = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{p}, *{p}]\n" for p, n in pairwise("abcdefgh"))
WRONG_FILES = {
    "key twice": (b"seed: 1\nlanguage: nl\nseed: 2", ":3: seed stands in line 1 already"),
    "key in both spellings": (b"run-name: a\nrun_name: b", ":2: run_name stands in line 1 already"),
    "unknown key": (
        b"\nsede: 1",
        ":2: no option 'sede'\n  The options are: dataset_path, ",
    ),
    "config itself": (b"config: x", ":1: no option 'config'"),
    "merge key": (b"<<: {seed: 1}", ":1: no option '<<'"),
    "number as key": (b"1: 2", ":1: no option '1'"),
    "list as key": (b"? [a]\n: b", ":1: a list"),
    "item of a list": (b"trackers:\n- wandb\n- wandbx", ":3: trackers: 'wandbx' is not possible"),
    "bomb of aliases": (BOMB.encode(), ":1: no option 'a'"),
    "alias to itself": (b"sample_prompt: &a [*a]", ":1: sample_prompt: a list"),
    "unknown alias": (b"seed: *a", ":1: not YAML (found undefined alias 'a')"),
    "list": (b"- seed", ": no options by name"),
    "one word": (b"seed", ": no options by name"),
    "two documents": (b"seed: 1\n---\nseed: 2", ":2: not YAML (but found another document)"),
    "two colons": (b"seed: 1\nmodel: a: b", ":2: not YAML (mapping values are not allowed here)"),
    "tab": (b"seed: 1\n\tmodel: a", ":2: not YAML ("),
    "open quote": (b'model: "a', ":1: not YAML ("),
    "deep list": (b"sample_prompt: " + b"[" * 100_000, ": not YAML (maximum recursion depth"),
    "deep mapping": (b"{seed: " * 100_000, ": not YAML (maximum recursion depth"),
    "not UTF-8": (b"seed: 1\nlanguage: caf\xe9", ": not YAML (unacceptable character #x00e9"),
    "NUL": (b"language: a\0b", ": not YAML ("),
    "escaped NUL": (b'language: "a\\0b"', ":1: language: 'a\\x00b' is not possible"),
    "zip": (b"PK\x03\x04", ": not YAML ("),
}


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ODD_TEXTS = st.sampled_from(
    [
        "",
        " ",
        "no",
        "null",
        "~",
        "1.10",
        "017",
        "--serve",
        "a: b",
        "- a",
        "\n",
        "a\n b",
        "\x85",
        "\u2028",
    ]
)


def values_of(kind: OptionType, default: Any) -> st.SearchStrategy[Any]:
    """Returns what an option may be."""
    texts = st.sampled_from(kind.choices) if kind.choices else TEXTS | ODD_TEXTS
    texts = texts if kind.may_be_empty else texts.filter(bool)
    one: st.SearchStrategy[Any] = {str: texts, bool: st.booleans(), Path: texts.map(Path)}.get(
        kind.base
    )
    limits = kind.limits
    if kind.base is int:
        one = st.integers(limits.ge, limits.le)
    elif kind.base is float:
        low, high = (
            (limits.gt if limits.ge is None else limits.ge),
            (limits.lt if limits.le is None else limits.le),
        )
        one = st.floats(low, high, exclude_min=limits.ge is None, exclude_max=limits.le is None)
    if kind.is_list:
        return st.lists(one, min_size=kind.min_length, max_size=3).map(tuple)
    return one | st.none() if default is None else one
