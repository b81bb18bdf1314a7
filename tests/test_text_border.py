"""Text that comes in or goes out: JSON of people, arguments, terminals that show less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from kiem.errors import ExitCode, UserError
from kiem.json_input import MAX_DEPTH, JsonError, parse_json, read_json, read_json_lines

FIX = "Mend it."


class Shape(msgspec.Struct):
    """What the files of these tests must hold."""

    layers: Annotated[int, msgspec.Meta(ge=1, le=100)]
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    names: list[str] = []


def read(data: bytes, folder: Path) -> Shape:
    path = folder / "in.json"
    path.write_bytes(data)
    return read_json(path, Shape, fix=FIX, exit_code=ExitCode.BAD_INPUT)


JSON_THAT_IS_READ: dict[str, tuple[bytes, Any]] = {
    "plain": (b'{"layers": 3}', {"layers": 3}),
    "byte order mark": (b'\xef\xbb\xbf{"layers": 3}', {"layers": 3}),
    "pair in escapes": (b'{"x": "\\ud83d\\ude00"}', {"x": "\N{GRINNING FACE}"}),
    "line separator": ('{"x": "a\u2028b"}'.encode(), {"x": "a\u2028b"}),
    "long number": (b'{"x": %s}' % (b"9" * 5000), {"x": float("inf")}),
    "number of 300 digits": (b"9" * 300, int("9" * 300)),
    "deep": (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, ...),
}
DEEP = b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)
JSON_THAT_IS_REFUSED = {
    "empty": (b"", ":1: empty"),
    "blank": (b" \n \n", ":3: empty"),
    "cut": (b'{"layers": 3,\n"na', ":2: not JSON (Unterminated string starting at at character 1)"),
    "lines": (b'{"layers": 3}\n{"layers": 3}', ":2: not JSON (Extra data at character 1)"),
    "not UTF-8": (b'{"layers": 3,\n"x": "caf\xe9"}', ":2: not UTF-8"),
    "UTF-16": ('{"layers": 3}'.encode("utf-16"), ":1: UTF-16, not UTF-8"),
    "too deep": (DEEP, ": not JSON (nested too deeply)"),
    "far too deep": (b'{"a":' * 100_000, ": not JSON (nested too deeply)"),
    "deep elsewhere": (b'{"layers": 3, "x": %s}' % DEEP, ": not JSON (nested too deeply)"),
    "half a pair": (
        b'{"layers": 3, "x": ["", "a\\ud800"]}',
        ": x[1] has half a surrogate pair at character 2",
    ),
    "half a pair in a key": (
        b'{"layers": 3, "\\uDC00": 1}',
        ": a key has half a surrogate pair at character 1",
    ),
    "key twice": (
        b'{"layers": 3, "layers": 4}',
        ': the key "layers" stands twice in an object',
    ),
    "array": (b"[]", ": expected object, got array"),
    "null": (b"null", ": expected object, got null"),
    "key missing": (b"{}", ": it lacks layers"),
    "fraction": (b'{"layers": 6.5}', ": layers = 6.5: expected int"),
    "whole float": (b'{"layers": 6.0}', ": layers = 6.0: expected int"),
    "boolean": (b'{"layers": true}', ": layers = true: expected int"),
    "text": (b'{"layers": "3"}', ': layers = "3": expected int'),
    "zero": (b'{"layers": 0}', ": layers = 0: expected int >= 1"),
    "many": (b'{"layers": 1000000000}', ": layers = 1000000000: expected int <= 100"),
    "thousands of digits": (
        b'{"layers": %s}' % (b"9" * 5000),
        ": layers = Infinity: expected int",
    ),
    "NaN": (b'{"layers": 3, "share": NaN}', ": share = NaN: expected float > 0.0"),
    "infinity": (b'{"layers": 3, "share": 1e999}', ": share = Infinity: expected float <= 1.0"),
    "inside a list": (b'{"layers": 3, "names": ["a", {}]}', ": names[1] = {}: expected str"),
    "long value": (
        b'{"layers": "%s"}' % (b"x" * 500),
        f': layers = "{"x" * 56}...: expected int',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JSON_THAT_IS_READ)
def test_json_that_is_read(name: str) -> None:
    data, expected = JSON_THAT_IS_READ[name]
    value = parse_json(data)
    assert expected is ... or value == expected


@pytest.mark.parametrize("name", JSON_THAT_IS_REFUSED)
def test_json_that_is_refused_names_its_place(name: str, tmp_path: Path) -> None:
    data, expected = JSON_THAT_IS_REFUSED[name]
    with pytest.raises(UserError) as caught:
        read(data, tmp_path)
    assert str(caught.value) == f"{tmp_path / 'in.json'}{expected}\n  {FIX}"


def test_json_lines_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"layers": 1}\r\n\n  \n{"layers": 2}\n{"layers": 0}')
    lines = read_json_lines(path, Shape, fix=FIX, exit_code=ExitCode.BAD_INPUT)
    assert [next(lines), next(lines)] == [(1, Shape(1)), (4, Shape(2))]
    with pytest.raises(UserError) as caught:
        next(lines)
    assert caught.value.where == f"{path}:5"
    with pytest.raises(UserError, match="cannot be read"):
        next(read_json_lines(tmp_path, Shape, fix=FIX, exit_code=ExitCode.BAD_INPUT))


def test_documents_may_have_odd_columns_that_nobody_reads() -> None:
    data = b'{"a": 1, "a": 2, "x": "\\ud800", "y": NaN}'
    assert parse_json(data, is_strict=False)["a"] == 2
    with pytest.raises(JsonError):
        parse_json(data)
    with pytest.raises(JsonError, match="too deeply"):
        parse_json(DEEP, is_strict=False)
    assert json.loads(json.dumps(parse_json(data, is_strict=False)["x"])) == "\ud800"
