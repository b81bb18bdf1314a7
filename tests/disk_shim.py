"""fault_shim.c as Python sees it: what a disk refuses, and when it kills."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

# As in fault_shim.c.
OPERATIONS = (
    *("write", "fsync", "rename", "open", "renameat2", "symlink", "flock", "truncate"),
    *("mkdir", "unlink", "close"),
)
ANY, SHORT, KILL, FULL, NEVER = -1, -1, -2, -3, 1 << 40


def compile_shim(folder: Path) -> Path:
    """Returns the compiled shim; skips the test where there is no C compiler, but not in CI."""
    compiler = shutil.which("cc")
    if compiler is None:
        assert not os.environ.get("CI"), "there is no C compiler"
        pytest.skip("there is no C compiler")
    library, source = folder / "fault_shim.so", Path(__file__).with_name("fault_shim.c")
    words = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"]
    subprocess.run(words, check=True)
    return library


class Shim:
    """The shim in a program that was started with it.

    Args:
        library: that which is preloaded.
        folder: below which it refuses calls.
    """

    def __init__(self, library: str, folder: Path):
        self._library = ctypes.CDLL(library)
        self._library.fault_calls.restype = ctypes.c_long
        self._folder = str(folder).encode()

    def arm(self, operation: int, call: int, kind: int, goes_on: bool = False) -> None:
        """Makes the given call of an operation, or of ANY, fail; counts from 0 again.

        Args:
            operation: its place in OPERATIONS.
            call: which call.
            kind: an errno, SHORT, KILL or FULL.
            goes_on: whether all calls after it fail as well.
        """
        self._library.fault_arm(self._folder, operation, ctypes.c_long(call), kind, goes_on)

    def refuse(self, operation: str, number: int) -> None:
        """Makes an operation fail always with an errno, or no more with 0."""
        self._library.fault_refuse(OPERATIONS.index(operation), number)

    @property
    def num_calls(self) -> int:
        """How many calls were counted."""
        return int(self._library.fault_calls())
