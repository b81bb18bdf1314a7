"""Runs of preprocess.py against a local Hub: several command lines in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from conftest import ROOT
from hub_server import HubServer

PROGRAM = """
import json, sys
from kiem.cli import run
from kiem.config import PreprocessOptions
from preprocess import main
for arguments in json.loads(sys.argv[1]):
    code = run(PreprocessOptions, "preprocess.py", main, arguments)
    print(f"--- {code}", flush=True)
    print("---", file=sys.stderr, flush=True)
"""


class Run(NamedTuple):
    """What a command line came to: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def run_all(
    hub: HubServer,
    cache: Path,
    command_lines: Sequence[Sequence[str | Path]],
    *,
    first: str = "",
    token: str | None = None,
    **variables: str,
) -> list[Run]:
    """Runs command lines of preprocess.py one after another.

    Args:
        hub: the Hub.
        cache: the folder of the Hub's cache.
        command_lines: arguments of each run.
        first: Python that runs before them.
        token: the login token.
        variables: more of the environment.
    """
    words = json.dumps([[str(word) for word in line] for line in command_lines])
    done = subprocess.run(
        [sys.executable, "-c", first + PROGRAM, words],
        env={**os.environ, "COLUMNS": "200", **hub.environment(cache, token), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    outs, errs = done.stdout.split("--- "), done.stderr.split("---\n")
    codes = [int(out.split("\n", 1)[0]) for out in outs[1:]]
    texts = [outs[0], *(out.split("\n", 1)[1] for out in outs[1:])]
    return [Run(*run) for run in zip(codes, texts, errs, strict=False)]


def manifest_of(folder: Path) -> dict[str, Any]:
    """Returns a manifest, which has the hash of every file and of itself."""
    return dict(json.loads((folder / "manifest.json").read_text()))


def downloaded(hub: HubServer) -> list[str]:
    """Returns the names of the files whose content was asked for so far, in order."""
    names = [
        path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in hub.log if "/resolve/" in path
    ]
    return [name for name in dict.fromkeys(names) if name != "README.md"]


@contextmanager
def watched(folder: Path, part: str) -> Iterator[list[int]]:
    """Yields a list of how many bytes are in folders named `part`, which grows meanwhile."""
    sizes: list[int] = []
    is_over = threading.Event()

    def size(path: Path) -> int:
        is_data = ".cache" not in path.parts or path.name.endswith(".incomplete")
        return path.stat().st_size if is_data and path.is_file() else 0

    def watch() -> None:
        while not is_over.wait(0.02):
            with suppress(OSError):  # what is removed meanwhile
                sizes.append(sum(map(size, folder.rglob(f"{part}/**/*"))))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        is_over.set()
        thread.join()
