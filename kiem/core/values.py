"""Types of options: the values that an option takes, read from text."""

from __future__ import annotations

import ast
import inspect
import math
import re
import reprlib
import shlex
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kiem.core.errors import bad_option

_LONGEST_NAME_BYTES = 255  # of a file or folder, on most disks
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class OptionType:
    """The values of an option, or for a list of each of its items.

    Attributes:
        base: str, int, float, bool or Path.
        choices: the only texts that are possible; empty: any.
        limits: between which a number must be.
        is_list: whether there may be several.
        min_length: the fewest items of a list.
        may_be_empty: whether a text may be empty; a path never is.
    """

    base: type
    choices: tuple[str, ...] = ()
    limits: Meta | None = None
    is_list: bool = False
    min_length: int = 0
    may_be_empty: bool = True

    def read(self, text: str, where: str) -> Any:
        """Returns the value of a text, for a list that of one item.

        Args:
            text: from the command line or a file.
            where: the option, or the place in the file, for the message.

        Raises:
            UserError: the text has no possible value.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python keeps other bytes as half surrogate pairs
            fix = "Write it in UTF-8; a file with such a name has to be renamed."
            raise bad_option(where, f"not UTF-8 at character {error.start + 1}", fix) from error
        try:
            value = _BOOLEANS[text.lower()] if self.base is bool else self.base(text)
            if self.limits:
                msgspec.convert(value, Annotated[self.base, self.limits])
            is_possible = not self.choices or text in self.choices
        except (ValueError, KeyError):
            is_possible = False
        is_empty = not text and (self.base is Path or not self.may_be_empty)
        is_nan = self.base is float and is_possible and math.isnan(value)
        if not is_possible or is_empty or is_nan or "\0" in text:
            what = f"{reprlib.repr(text)} is not possible"
            raise bad_option(where, what, f"Give {self.describe()}.")
        return value

    def describe(self) -> str:
        """Returns which values are possible, such as "a whole number from 1 to 8"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = "a path" if self.base is Path else _WORDS[self.base]
        if not self.may_be_empty:
            words = "non-empty text"
        if not (limits := self.limits):
            return words
        if limits.ge is not None and limits.le is not None:
            return f"{words} from {limits.ge} to {limits.le}"
        low = f"from {limits.ge}" if limits.gt is None else f"above {limits.gt}"
        high = f"at most {limits.le}" if limits.lt is None else f"below {limits.lt}"
        return f"{words} {low}, {high}"


def option_types(options_class: type[Any]) -> dict[str, OptionType]:
    """Returns the type of each option of a dataclass by name."""
    hints = typing.get_type_hints(options_class, include_extras=True)
    return {name: _option_type(hint) for name, hint in hints.items()}


def option_rows(options_class: type[Any]) -> Iterator[tuple[list[str], str, str, str]]:
    """Yields flags, values, default and meaning of each option, for help and docs/reference.md."""
    meanings = _meanings(options_class)
    kinds = option_types(options_class)
    for field in fields(options_class):
        kind, default = kinds[field.name], field.default
        values = "flag" if kind.base is bool else kind.describe() + " ..." * kind.is_list
        if default is MISSING:
            shown = "required"
        elif kind.base is bool:
            shown = "on" if default else "off"
        else:
            words = default if isinstance(default, tuple) else [default]
            shown = shlex.join(str(word) for word in words if word is not None)
        yield option_flags(field.name, kind), values, shown, meanings.get(field.name, "")


def option_flag(name: str) -> str:
    """Returns an option's name on the command line."""
    return "--" + name.replace("_", "-")


def given_options(options: Any) -> list[str]:
    """Returns the names of the options that have another value than their default."""
    return [
        field.name for field in fields(options) if getattr(options, field.name) != field.default
    ]


def option_flags(name: str, kind: OptionType) -> list[str]:
    """Returns the ways in which an option is written on the command line."""
    flag = option_flag(name)
    return [flag, f"--no-{flag[2:]}"] if kind.base is bool else [flag]


def _meanings(options_class: type[Any]) -> dict[str, str]:
    """Returns the string below each field of a dataclass, which only its source has."""
    try:
        described = ast.parse(inspect.getsource(options_class)).body[0]
    except (OSError, TypeError):  # a class without a source file
        return {}
    assert isinstance(described, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(below.value).split())
        for field, below in pairwise(described.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _option_type(hint: Any) -> OptionType:
    """Reads an annotation: a type, Literal or tuple of several, perhaps optional or with limits."""
    limits, is_list, min_length, may_be_empty = None, False, 0, True
    while True:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            hint, (meta,) = arguments[0], arguments[1:]
            if typing.get_origin(hint) is tuple:
                min_length = meta.min_length
            elif hint is str:
                may_be_empty = not meta.min_length
            else:
                limits = meta
        elif origin in (types.UnionType, typing.Union):  # Optional[Literal] is of the second kind
            (hint,) = (argument for argument in arguments if argument is not type(None))
        elif origin is tuple:
            hint, is_list = arguments[0], True
        elif origin is Literal:
            return OptionType(str, arguments, None, is_list, min_length)
        else:
            return OptionType(hint, (), limits, is_list, min_length, may_be_empty)


def check_name(name: str, option: str) -> str:
    """Returns `name` when it is safe as the name of one folder.

    Raises:
        UserError: it is empty or too long, or has characters that cause trouble in paths.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name) or len(name.encode()) > _LONGEST_NAME_BYTES:
        raise bad_option(
            option,
            f"{name!r} cannot be a folder name",
            "Use letters, digits, '.', '_', '+' and '-', beginning with a letter or digit, "
            f"and no more than {_LONGEST_NAME_BYTES} bytes.",
        )
    return name
