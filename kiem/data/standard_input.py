"""Text from standard input, kept in a file since it is read in parallel and more than once."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from kiem.disk import writing_errors

STANDARD_INPUT = "-"


def keep_standard_input() -> Path:
    """Copies standard input into a nameless temporary file and returns a path that opens it.

    The file is gone as soon as this process and those that it forked are, however they end.

    Raises:
        UserError: the disk of the temporary folder is full.
    """
    folder = Path(tempfile.gettempdir())
    with writing_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        return Path(f"/proc/self/fd/{os.dup(file.fileno())}")
