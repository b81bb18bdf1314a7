"""What values an option takes, and its value from the text on a command line or in a file."""

from __future__ import annotations

import math
import re
import reprlib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msgspec import Meta

from kiem.core.errors import ExitCode, UserError

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
        """Returns the value, for a list that of one item, that a text stands for.

        Args:
            text: what stands on the command line or in the file.
            where: the option, or the place in the file, for the message.

        Raises:
            UserError: it stands for no possible value.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python keeps other bytes as half surrogate pairs
            raise UserError(
                f"not UTF-8 at character {error.start + 1}",
                where=where,
                fix="Write it in UTF-8; a file with such a name has to be renamed.",
                exit_code=ExitCode.BAD_OPTION,
            ) from error
        try:
            value = _BOOLEANS[text.lower()] if self.base is bool else self.base(text)
            is_possible = "\0" not in text and self._has(value)
        except (ValueError, KeyError):
            is_possible = False
        if not is_possible or (not text and (self.base is Path or not self.may_be_empty)):
            raise UserError(
                f"{reprlib.repr(text)} is not possible",
                where=where,
                fix=f"Give {self.describe()}.",
                exit_code=ExitCode.BAD_OPTION,
            )
        return value

    def describe(self) -> str:
        """Returns in words which values are possible, such as "a whole number from 1 to 8"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = "a path" if self.base is Path else _WORDS[self.base]
        if not self.may_be_empty:
            words = "text that is not empty"
        return f"{words} {describe_limits(self.limits)}" if self.limits else words

    def _has(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.limits is None:
            return True
        limits = self.limits
        return (
            math.isfinite(value)
            and (limits.ge is None or value >= limits.ge)
            and (limits.gt is None or value > limits.gt)
            and (limits.le is None or value <= limits.le)
            and (limits.lt is None or value < limits.lt)
        )


def is_boolean(text: str) -> bool:
    """Returns whether a text stands for true or false."""
    return text.lower() in _BOOLEANS


def describe_limits(limits: Meta) -> str:
    """Returns limits in words, such as "from 1 to 8" or "above 0, at most 1"."""
    if limits.ge is not None and limits.le is not None:
        return f"from {limits.ge} to {limits.le}"
    low = f"from {limits.ge}" if limits.gt is None else f"above {limits.gt}"
    high = f"at most {limits.le}" if limits.lt is None else f"below {limits.lt}"
    return f"{low}, {high}"


def option_types(options_class: type[Any]) -> dict[str, OptionType]:
    """Returns the type of each option of a dataclass by name."""
    hints = typing.get_type_hints(options_class, include_extras=True)
    return {name: _option_type(hint) for name, hint in hints.items()}


def _option_type(hint: Any) -> OptionType:
    """Reads an annotation: a type, Literal or tuple of several, perhaps optional or with limits."""
    limits, is_list, min_length, may_be_empty = None, False, 0, True
    while True:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
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
        UserError: it is empty or too long, starts with a dot or dash, or has characters that paths
            dislike.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", name) or len(name.encode()) > _LONGEST_NAME_BYTES:
        raise UserError(
            f"{name!r} cannot be a folder name",
            where=option,
            fix="Use letters, digits, '.', '_', '+' and '-', beginning with a letter or digit, "
            f"and no more than {_LONGEST_NAME_BYTES} bytes.",
            exit_code=ExitCode.BAD_OPTION,
        )
    return name
