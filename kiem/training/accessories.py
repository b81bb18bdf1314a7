"""What a run does beside its weights, checkpoints and log: trackers, samples, report, display ...

An accessory never ends a run. Before the first update it is tried, where it can be, and what is
wrong with it is an error (`try_before`); from then on all calls go through `attempt`, and the first
failure is a warning, after which the run does without it. `error_of` is the only place that catches
whatever goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from kiem.core.errors import ExitCode, UserError
from kiem.parallel.distributed import Distributed

if TYPE_CHECKING:
    from kiem.training.run import Run

T = TypeVar("T")
_MOST_CHARACTERS = 1000


def error_of(action: Callable[[], object]) -> BaseException | None:
    """Does something and returns what went wrong; None if nothing did.

    Ctrl-C is not caught. All else is: a library that means to end the program (`SystemExit`), a
    panic of a library in Rust and a cancelled asyncio task (`BaseException`s) would end a run.
    """
    try:
        action()
    except BaseException as error:  # accessories are code of others, too
        if isinstance(error, KeyboardInterrupt) and current_thread() is main_thread():
            raise
        return error
    return None


def attempt(run: Run, console: Console, name: str, action: Callable[[], T]) -> T | None:
    """Does what the weights do not need.

    Args:
        run: the run; it remembers what has failed.
        console: where the warning goes.
        name: what it is, for people. A name that has failed is not tried again.
        action: what to do; it may not wait for other processes.

    Returns:
        What `action` returns; None if it failed, now or earlier.
    """
    if name in run.left_out:
        return None
    found: list[T] = []
    error = error_of(lambda: found.append(action()))
    if error is None:
        return found[0]
    _leave_out(run, console, name, in_words(error))
    return None


def attempt_together(
    run: Run, distributed: Distributed, console: Console, name: str, action: Callable[[], T]
) -> T | None:
    """As `attempt`, for what each process does a share of: all have it in the end, or none."""
    found = attempt(run, console, name, action)
    if not distributed.any(found is None):
        return found
    if name not in run.left_out:
        _leave_out(run, console, name, "in another process")
    return None


def try_before(where: str, action: Callable[[], T]) -> T:
    """Does something before the first update that may only warn later.

    Args:
        where: the option that asks for it.
        action: what to do.

    Raises:
        UserError: it fails; nothing is lost yet.
    """
    found: list[T] = []
    error = error_of(lambda: found.append(action()))
    if isinstance(error, UserError):
        raise error
    if error is not None:
        raise UserError(
            f"does not work here ({in_words(error)})",
            where=where,
            fix="Mend that, or leave the option out: the weights do not depend on it.",
            exit_code=ExitCode.BAD_OPTION,
        ) from error
    return found[0]


def in_words(error: BaseException) -> str:
    """Returns an error on one line that is not long and can be written as UTF-8."""
    if isinstance(error, UserError):
        words = f"{error.where}: {error.what}" if error.where else error.what
    else:
        texts: list[str] = []
        error_of(lambda: texts.append(str(error)))  # which is code of others
        lines = "".join(texts).strip().splitlines()
        words = ": ".join([type(error).__name__, *lines[:1]])
    return words.encode(errors="replace").decode()[:_MOST_CHARACTERS]


def _leave_out(run: Run, console: Console, name: str, reason: str) -> None:
    run.left_out.add(name)
    run.warn(console, f"{name} failed ({reason}); the run goes on without it")
