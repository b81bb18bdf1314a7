"""Compiler for the C++ beside some modules: on this machine and for it.

A compiled library is kept in the user's cache folder, under a name that says what it was made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kiem.core.cache import cache_folder
from kiem.core.console import PlainConsole
from kiem.core.errors import UserError
from kiem.core.files import write_bytes

# The arguments of a library's functions, as ctypes knows them.
Signatures = Mapping[str, Sequence[Any]]

# Compilers for ARM know the processor at hand by -mcpu, and some not by -march.
_NATIVE = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"
_FLAGS = ["-O3", _NATIVE, "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-std=c++17"]


def load_library(source: Path, signatures: Signatures) -> ctypes.CDLL | str:
    """Returns the library of a source file, or a sentence that says why there is none.

    Args:
        source: the file; others in its folder may be parts of it.
        signatures: of its functions, none of which returns anything.
    """
    compiler, version = _find_compiler()
    if not version:
        return f"there is no working C++ compiler {' '.join(compiler)!r}; install one or set CXX"
    recipe = b"\n".join([*read_sources(source), " ".join(_FLAGS).encode(), version, processor()])
    name = f"{source.stem}-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
    try:
        cache = cache_folder()
        if (cache / name).exists():
            return open_library(cache / name, signatures)
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes of a machine
        console = PlainConsole(stderr=True, quiet=not is_first)
        console.print(f"compiling {source.name} for this processor: once, some seconds")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = Path(folder) / name
            error = compile_library(source, library)
            if error is not None:
                return error
            # Without a writable cache it is compiled each time.
            with contextlib.suppress(UserError, OSError):
                cache.mkdir(parents=True, exist_ok=True)
                write_bytes(cache / name, library.read_bytes())
            return open_library(library, signatures)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        return f"there is no place to compile {source.name} in ({error})"


def read_sources(source: Path) -> list[bytes]:
    """Returns the content of all that a library is made from: the files beside its source."""
    return [path.read_bytes() for path in sorted(source.parent.iterdir()) if path.is_file()]


def compile_library(source: Path, library: Path, *extra_flags: str) -> str | None:
    """Compiles a library; returns what was wrong, if anything."""
    compiler, _ = _find_compiler()
    command = [*compiler, *_FLAGS, *extra_flags, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    if re.search(r"\bomp\.h|-fopenmp|-lg?omp\b", done.stderr):
        fix = "install libomp (Debian's libomp-dev), or on macOS GCC, and set CXX to its g++"
        return f"{' '.join(compiler)} lacks OpenMP; {fix}"
    lines = done.stderr.strip().splitlines()
    first = next((line for line in lines if "error" in line), "".join(lines[-1:]))
    return f"{' '.join(compiler)} cannot compile {source.name}: {first[:300]}"


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


def _find_compiler() -> tuple[list[str], bytes]:
    """Returns the command of a C++ compiler, and its version if it works.

    That is CXX, which may have arguments (ccache g++), or else g++ or clang++.
    """
    given = os.environ.get("CXX", "").split()
    candidates = [given] if given else [["g++"], ["clang++"]]
    for command in candidates:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            asked = subprocess.run([*command, "--version"], capture_output=True, check=True)
            return command, asked.stdout or b"unknown"
    return candidates[0], b""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> bytes:
    """Returns what tells processors with different instructions apart.

    Args:
        cpuinfo: what Linux says of the processors. Elsewhere the name has to do.
    """
    with contextlib.suppress(OSError):
        lines = cpuinfo.read_bytes().splitlines()
        # The latter on ARM.
        found = (line for line in lines if line.startswith((b"flags", b"Features")))
        return next(found, platform.machine().encode())
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # macOS
        words = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(words, capture_output=True, check=True).stdout
    return (platform.processor() or platform.machine()).encode()
