"""Errors that users can correct, with their exit codes.

The command line prints a `UserError` as one message without a traceback. Mistakes of the program
are `assert`s and keep their traceback.
"""

from __future__ import annotations

import enum
from functools import partial
from typing import Any


class ExitCode(enum.IntEnum):
    """Exit codes of every kiem command; 0 is success, 1 is a defect of kiem itself."""

    BAD_OPTION = 2
    HUB_LOGIN = 3
    HUB_LICENCE = 4
    NETWORK = 5
    UNKNOWN_SIZE = 6
    BAD_INPUT = 7
    NOT_A_MODEL = 8
    TOKENIZER_MISMATCH = 9
    DISK_SPACE = 10
    DATASET_TOO_SMALL = 11
    NO_EFFECT = 12
    NOT_FOUND = 13
    ALREADY_EXISTS = 14
    DAMAGED = 15
    OUT_OF_MEMORY = 16
    NOT_FINITE = 17
    NOT_WRITABLE = 18
    STOPPED = 19
    HUNG = 20
    PROCESS_LOST = 21
    INTERRUPTED = 130


class UserError(Exception):
    """An error that the user can correct.

    Args:
        what: what is wrong.
        fix: what to do about it.
        exit_code: the exit code of the program.
        where: the file, line or option that is wrong, if there is one.
    """

    def __init__(self, what: str, *, fix: str, exit_code: ExitCode, where: str | None = None):
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.exit_code = exit_code
        self.where = where

    def __reduce__(self) -> tuple[partial[UserError], tuple[str]]:
        # Between processes; exceptions are pickled by their positional arguments alone.
        given: dict[str, Any] = {"fix": self.fix, "exit_code": self.exit_code, "where": self.where}
        return partial(type(self), **given), (self.what,)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}\n  {self.fix}"


def bad_option(option: str, what: str, fix: str) -> UserError:
    """Returns the error for an option's value that is not possible."""
    return UserError(what, where=option, fix=fix, exit_code=ExitCode.BAD_OPTION)


def bad_input(where: str, what: str, fix: str) -> UserError:
    """Returns the error for text or data in another form than expected."""
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT)


def not_found(where: str, what: str, fix: str) -> UserError:
    """Returns the error for a file or folder that is missing."""
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.NOT_FOUND)


def already_exists(where: str, what: str, fix: str) -> UserError:
    """Returns the error for a name that is taken by something else, or by another process."""
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.ALREADY_EXISTS)


def damaged(where: str, what: str, fix: str) -> UserError:
    """Returns the error for a file that kiem wrote and that is changed or incomplete."""
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.DAMAGED)


def not_installed(package: str, option: str) -> UserError:
    """Returns the error for an option that needs a package that is not installed."""
    what, fix = f"needs {package}, which is not installed", f"Install it: pip install {package}"
    return bad_option(option, what, fix)


def no_effect(option: str, why: str) -> UserError:
    """Returns the error for an option without effect; `why` is such as "without --serve"."""
    what, fix = f"has no effect {why}", "Leave it out."
    return UserError(what, where=option, fix=fix, exit_code=ExitCode.NO_EFFECT)
