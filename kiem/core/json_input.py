"""JSON that people and other programs wrote: read in this one place, every fault with its place.

Python's own reader lets through what is no text (half a surrogate pair), takes the last of two
equal keys, and has four kinds of exception for the rest. Files that kiem writes for itself are read
here as well, since people copy, edit and cut them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kiem.core.errors import ExitCode, UserError

Kind = TypeVar("Kind")

MAX_DEPTH = 200  # Python's own limit is nearer the deeper the caller stands
_MAX_DIGITS = 300  # of a whole number; every such number is a float as well
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole one
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_PLACE = re.compile(r"(?P<what>.*) - at `\$\.?(?P<key>.*)`", re.DOTALL)


class JsonError(ValueError):
    """Text that is no JSON that kiem can use; `str()` says why, without its place.

    Attributes:
        line: where, counted from 1; None if that is not known.
    """

    def __init__(self, what: str, line: int | None = None):
        super().__init__(what)
        self.line = line


def parse_json(data: bytes, *, is_strict: bool = True) -> Any:
    """Returns what JSON says. NaN and infinity are floats, and so are numbers of 300 digits.

    Args:
        data: UTF-8, with or without a byte order mark.
        is_strict: whether a key that stands twice in an object (else the last one counts) and half
            a surrogate pair are errors. Where all is used they must be; documents have columns that
            nobody reads.

    Raises:
        JsonError: it is not UTF-8, not JSON, or nested deeper than MAX_DEPTH.
    """
    hook = _object_of if is_strict else None
    try:
        text = data.removeprefix(_BOM).decode()
        value = json.loads(text, parse_int=_number, object_pairs_hook=hook)
    except UnicodeDecodeError as error:
        what = "UTF-16, not UTF-8" if data.startswith(_UTF16_BOMS) else "not UTF-8"
        raise JsonError(what, data.count(b"\n", 0, error.start) + 1) from error
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg} at character {error.colno})" if text.strip() else "empty"
        raise JsonError(what, error.lineno) from error
    except RecursionError as error:
        raise JsonError("not JSON (nested too deeply)") from error
    if (is_strict and _HALF_PAIR.search(text)) or text.count("[") + text.count("{") > MAX_DEPTH:
        _check(value, is_strict)
    return value


def read_json(path: Path, kind: type[Kind], *, fix: str, exit_code: ExitCode) -> Kind:
    """Returns what a JSON file says.

    Args:
        path: the file.
        kind: what it must be, with its ranges: a msgspec.Struct, dict[str, Any] or another type.
        fix: what to do if it is not.
        exit_code: the exit code then.

    Raises:
        UserError: the file cannot be read, is not JSON or not of that kind; names line or key.
    """
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise UserError(what, where=str(path), fix=fix, exit_code=exit_code) from error
    except JsonError as error:
        where = f"{path}:{error.line}" if error.line else str(path)
        raise UserError(str(error), where=where, fix=fix, exit_code=exit_code) from error
    return convert(value, kind, where=str(path), fix=fix, exit_code=exit_code)


def read_json_lines(
    path: Path, kind: type[Kind], *, fix: str, exit_code: ExitCode
) -> Iterator[tuple[int, Kind]]:
    """Yields the values of a JSON Lines file with their line numbers; blank lines have none.

    Arguments and errors are those of `read_json`.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.removeprefix(_BOM).strip():
                    continue
                where = f"{path}:{number}"
                try:
                    value = parse_json(line)
                except JsonError as error:
                    raise UserError(
                        str(error), where=where, fix=fix, exit_code=exit_code
                    ) from error
                yield number, convert(value, kind, where=where, fix=fix, exit_code=exit_code)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise UserError(what, where=str(path), fix=fix, exit_code=exit_code) from error


def convert(value: Any, kind: type[Kind], *, where: str, fix: str, exit_code: ExitCode) -> Kind:
    """Returns a value of `parse_json` as `kind`: types and ranges are checked, nothing is coerced.

    Raises:
        UserError: it is something else; names the key.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what = _explain(str(error), value)
        raise UserError(what, where=where, fix=fix, exit_code=exit_code) from error


def shown(value: Any) -> str:
    """Returns a JSON value as it stands in a message: on one line, and short."""
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


def _check(value: Any, is_strict: bool) -> None:
    """Refuses what is nested too deeply and, if strict, text that is none."""
    waiting: list[tuple[str, Any, int]] = [("", value, 1)]
    while waiting:
        key, item, depth = waiting.pop()
        if isinstance(item, str):
            if is_strict:
                _check_text(item, key)
            continue
        if isinstance(item, list):
            inner = ((f"{key}[{index}]", entry, depth + 1) for index, entry in enumerate(item))
        elif isinstance(item, dict):
            for name in item if is_strict else ():
                _check_text(name, "a key")
            inner = (
                (f"{key}.{name}".lstrip("."), entry, depth + 1) for name, entry in item.items()
            )
        else:
            continue
        if depth > MAX_DEPTH:
            raise JsonError("not JSON (nested too deeply)")
        waiting.extend(inner)


def _check_text(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"{key or 'the text'} has half a surrogate pair at character {error.start + 1}"
        raise JsonError(place) from error


def _explain(message: str, value: Any) -> str:
    """Returns msgspec's message with the value it is about, and without its signs."""
    found = _PLACE.fullmatch(message)
    key, what = ("", message) if found is None else (found["key"], found["what"])
    what = what.replace("`", "").replace("Object missing required field", "it lacks")
    what = what.replace("Object contains unknown field", "unknown key")
    if what.startswith("it lacks"):
        return f"{key}: {what}" if key else what
    if what.startswith("Invalid enum value"):
        what = "this value is not supported"
    if not key:
        return what[0].lower() + what[1:]
    what = what.split(", got ")[0].replace(" | null", "").replace("Expected", "expected")
    if "[...]" in key:  # in one of the entries of an object; msgspec does not say which
        return f"{key}: {what}"
    place = value
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key):
        place = place[int(index) if index else name]
    return f"{key} = {shown(place)}: {what}"
