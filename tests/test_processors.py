"""Tests of the number of processors that a program takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kiem.core.processors import num_processors


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 6), ("250000 100000", 3), ("10000 100000", 1), ("900000 100000", 6), ("", 6)],
)
def test_the_quota_of_a_container_counts(
    text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    file = tmp_path / "cpu.max"
    assert num_processors(file) == 6
    file.write_text(text, encoding="utf-8")
    assert num_processors(file) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_processors() == 1
    finally:
        os.sched_setaffinity(0, before)
