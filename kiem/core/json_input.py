"""Reader for small JSON files, such as configurations; every mistake is reported with its place.

Python's own reader accepts half a surrogate pair, takes the last of two equal keys, and raises four
kinds of exception for the rest. Files that kiem writes for itself are read here as well, since
people copy, edit and cut them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kiem.core.errors import ExitCode, UserError

Kind = TypeVar("Kind")

MAX_DEPTH = 200  # Python's own limit depends on the depth of the caller
_MAX_DIGITS = 300  # of a whole number; every such number is a float as well
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole one
_BOM = b"\xef\xbb\xbf"


class JsonError(ValueError):
    """Text that is not JSON that kiem can use; `str()` gives the reason, without its place.

    Attributes:
        line: where, counted from 1; None if that is not known.
    """

    def __init__(self, what: str, line: int | None = None):
        super().__init__(what)
        self.line = line


def parse_json(data: bytes) -> Any:
    """Returns the value of JSON. NaN, infinity and numbers of more than 300 digits are floats.

    Args:
        data: UTF-8, with or without a byte order mark.

    Raises:
        JsonError: it is not UTF-8, not JSON, or nested deeper than MAX_DEPTH; a key stands twice in
            an object, or a text has half a surrogate pair.
    """
    try:
        text = data.removeprefix(_BOM).decode()
        value = json.loads(text, parse_int=_number, object_pairs_hook=_object_of)
    except UnicodeDecodeError as error:
        raise JsonError("not UTF-8", data.count(b"\n", 0, error.start) + 1) from error
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg} at character {error.colno})" if text.strip() else "empty"
        raise JsonError(what, error.lineno) from error
    except RecursionError as error:
        raise JsonError("not JSON (nested too deeply)") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_too_deep(value):
        raise JsonError("not JSON (nested too deeply)")
    if _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            before = error.object[max(0, error.start - 30) : error.start]
            raise JsonError(f"half a surrogate pair after {before}") from error
    return value


def read_json(path: Path, kind: type[Kind], *, fix: str, exit_code: ExitCode) -> Kind:
    """Returns the value of a JSON file.

    Args:
        path: the file.
        kind: its type, with ranges: a msgspec.Struct, dict[str, Any] or another type.
        fix: what to do if it is not.
        exit_code: the exit code then.

    Raises:
        UserError: the file cannot be read, is not JSON or not of that kind; names line or key.
    """
    where = str(path)
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise UserError(what, where=where, fix=fix, exit_code=exit_code) from error
    except JsonError as error:
        where = f"{path}:{error.line}" if error.line else where
        raise UserError(str(error), where=where, fix=fix, exit_code=exit_code) from error
    return convert(value, kind, where=where, fix=fix, exit_code=exit_code)


def convert(value: Any, kind: type[Kind], *, where: str, fix: str, exit_code: ExitCode) -> Kind:
    """Returns a value of `parse_json` as `kind`: types and ranges are checked, nothing is coerced.

    Raises:
        UserError: it has another type or range; names the key.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what = _explain(str(error), value)
        raise UserError(what, where=where, fix=fix, exit_code=exit_code) from error


def shown(value: Any) -> str:
    """Returns a JSON value for a message: on one line, and short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(digits: str) -> int | float:
    # Python refuses to read whole numbers of thousands of digits, and slows down before that.
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise JsonError(f"the key {shown(twice)} stands twice in an object")
    return found


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = below
    return any(isinstance(item, (dict, list)) for item in level)


def _explain(message: str, value: Any) -> str:
    """Returns msgspec's message, such as "Expected `int` - at `$.x`", with the value found."""
    what, _, key = message.replace("`", "").rpartition(" - at $")
    key, what = (key.lstrip("."), what) if what else ("", key)
    what = what[0].lower() + what[1:]
    if not key:
        return what
    what = what.split(", got ")[0].replace(" | null", "")
    # In one of the entries of an object msgspec does not say which.
    if "[...]" in key or what.startswith("object"):
        return f"{key}: {what}"
    place = value
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key):
        place = place[int(index) if index else name]
    return f"{key} = {shown(place)}: {what}"
