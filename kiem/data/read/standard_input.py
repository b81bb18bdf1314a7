"""Text from standard input, kept in a file since it is read in parallel and more than once."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kiem.core.disk import writing_errors
from kiem.core.errors import ExitCode, UserError

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


def check_one_reader(**values: Sequence[str | Path]) -> None:
    """Raises a UserError if standard input, which can be read once, is a value of two options.

    Args:
        values: of each option.
    """
    readers = [name for name, given in values.items() if STANDARD_INPUT in map(str, given)]
    if len(readers) > 1:
        raise UserError(
            f"standard input is read for --{readers[0]} already",
            where=f"--{readers[1]} {STANDARD_INPUT}",
            fix="Give a file.",
            exit_code=ExitCode.BAD_OPTION,
        )
