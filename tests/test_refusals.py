"""Disks that refuse, in every way, every call of what writes; and kills between any two calls.

Whatever it is: there is no traceback; a name has its old content or its new one; a `UserError` says
where it was; what a disk does not have and the result does not need is one warning; and the next
start ends as if nothing had been.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from disk_shim import compile_shim


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is such a place, for hundreds of files."""
    memory = Path("/dev/shm")
    is_there = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if is_there else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("how", "least_calls"),
    [
        ("refused", 180),
        ("refused without swapping", 45),
        ("killed", 180),
        ("killed without swapping", 45),
        ("missing", 180),
    ],
)
def test_old_or_new_and_no_traceback(
    how: str, least_calls: int, library: Path, place: Path
) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "refusals_program.py", library, place, how],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *problems, summary = done.stdout.splitlines()
    print(summary)
    assert not problems, done.stdout
    assert int(summary.split()[-2]) >= least_calls
