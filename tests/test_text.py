"""Text while it comes: nothing that a stop string would take back, and never half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.tokenizer.text_stream import TextStream
from kiem.tokenizer.tokenizer import Tokenizer


def cut(text: str, stop: list[str]) -> str:
    """Returns a text up to the stop string that is complete first, character after character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab \né🇳", max_size=40),
    stop=st.lists(st.text("ab \né", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings(trained: Tokenizer, text: str, stop: list[str]) -> None:
    stream = TextStream(trained, stop)
    shown, expected = "", cut(text, stop)
    for token in trained.encode(text):
        shown += stream.add(token)
        assert expected.startswith(shown)
    assert shown + stream.end() == expected
    assert stream.is_stopped == (expected != text)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("een twee drie", ["ee"], ""),
        ("een twee drie", ["drie", "wee"], "een t"),
        ("abcd", ["abcd", "bc"], "a"),
        ("abc", ["bc", "abc"], ""),
        ("één €uro", ["€"], "één "),
        ("aan het ein", ["einde"], "aan het ein"),
    ],
)
def test_stop_strings_by_example(
    trained: Tokenizer, text: str, stop: list[str], shown: str
) -> None:
    stream = TextStream(trained, stop)
    assert "".join(map(stream.add, trained.encode(text))) + stream.end() == shown
