"""What people can get wrong, and the exit code that says which it was.

`UserError` is for mistakes a person can mend: the command line turns it into one message without a
traceback. Our own mistakes are `assert`s and keep their traceback.
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
    """A mistake a person can mend.

    Args:
        what: what is wrong, one sentence.
        fix: what to do about it.
        exit_code: the exit code of the program.
        where: the file, line or option it is about, if there is one.
    """

    def __init__(self, what: str, *, fix: str, exit_code: ExitCode, where: str | None = None):
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.exit_code = exit_code
        self.where = where

    def __reduce__(self) -> tuple[partial[UserError], tuple[str]]:
        # Exceptions are pickled by their positional arguments; these go between processes.
        given: dict[str, Any] = {"fix": self.fix, "exit_code": self.exit_code, "where": self.where}
        return partial(type(self), **given), (self.what,)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}\n  {self.fix}"


def bad_option(option: str, what: str, fix: str) -> UserError:
    """Returns the error for an option's value that is not possible."""
    return UserError(what, where=option, fix=fix, exit_code=ExitCode.BAD_OPTION)


def bad_input(where: str, what: str, fix: str) -> UserError:
    """Returns the error for text or data that cannot be read as what it is meant to be."""
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT)


def not_found(where: str, what: str, fix: str) -> UserError:
    """Returns the error for a file or folder that is missing or not what is expected there."""
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.NOT_FOUND)


def damaged(where: str, what: str, fix: str) -> UserError:
    """Returns the error for a file of kiem's whose content has changed or is incomplete."""
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.DAMAGED)


def not_installed(package: str, option: str) -> UserError:
    """Returns the error for an option that needs a package that is not installed."""
    return UserError(
        f"needs {package}, which is not installed",
        where=option,
        fix=f"Install it with: pip install {package}",
        exit_code=ExitCode.BAD_OPTION,
    )


def no_effect(option: str, why: str) -> UserError:
    """Returns the error for an option that cannot have an effect: `why` says in which company."""
    return UserError(
        f"has no effect {why}",
        where=option,
        fix="Leave it out.",
        exit_code=ExitCode.NO_EFFECT,
    )
