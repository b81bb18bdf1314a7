"""Compiles the C++ that stands beside some modules, on this machine and for it.

A compiled library is kept in the user's cache folder, under a name that says what it was made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kiem.core.errors import UserError
from kiem.core.files import write_bytes

# The arguments of a library's functions, as ctypes knows them.
Signatures = Mapping[str, Sequence[Any]]

_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off"),
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-std=c++17",
)


def load_library(source: Path, signatures: Signatures) -> ctypes.CDLL | str:
    """Returns the library of a source file, or a sentence that says why there is none.

    Args:
        source: the file; others in its folder may be parts of it.
        signatures: of its functions, none of which returns anything.
    """
    compiler = _compiler()
    try:
        asked = subprocess.run([*compiler, "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        name = " ".join(compiler)
        return f"there is no working C++ compiler {name!r}; install one or set CXX"
    sources = [path.read_bytes() for path in sorted(source.parent.iterdir()) if path.is_file()]
    recipe = b"\n".join([*sources, " ".join(_FLAGS).encode(), asked.stdout, _processor()])
    name = f"{source.stem}-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
    try:
        return _kept_or_made(source, name, signatures)
    except (OSError, RuntimeError) as error:  # the latter where nobody has a home
        return f"there is no place to compile {source.name} in ({error})"


def _kept_or_made(source: Path, name: str, signatures: Signatures) -> ctypes.CDLL | str:
    """Returns what `load_library` does, from the cache folder if it is there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kiem"
    kept = cache / name
    if kept.exists():
        return open_library(kept, signatures)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Path(folder) / name
        error = compile_library(source, made)
        if error is not None:
            return error
        # A cache that cannot be written to costs the seconds of compiling each time, no more.
        with contextlib.suppress(UserError, OSError):
            cache.mkdir(parents=True, exist_ok=True)
            write_bytes(kept, made.read_bytes())
        return open_library(made, signatures)


def compile_library(source: Path, library: Path, *extra_flags: str) -> str | None:
    """Makes the library; returns what was wrong, if so."""
    compiler = _compiler()
    command = [*compiler, *_FLAGS, *extra_flags, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if "error" in line), "".join(lines[-1:]))
        return f"{' '.join(compiler)} cannot compile {source.name}: {first[:300]}"
    return None


def open_library(library: Path, signatures: Signatures) -> ctypes.CDLL | str:
    """Returns a compiled library, or what is wrong with it."""
    try:
        opened = ctypes.CDLL(str(library))
    except OSError as error:
        return f"the compiled {library.name} cannot be loaded ({error})"
    for name, types in signatures.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = types, None
    return opened


def _compiler() -> list[str]:
    """Returns the command of the C++ compiler; CXX may have arguments, such as ccache g++."""
    return os.environ.get("CXX", "").split() or ["g++"]


def _processor() -> bytes:
    """Returns what tells processors with different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith("flags")), platform.machine()).encode()
