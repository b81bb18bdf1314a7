"""What a run does beside its weights, checkpoints and log: trackers, samples, report, display ...

An accessory never ends a run. Before the first update it is tried, where it can be, and what is
wrong with it is an error (`try_before`); from then on all calls go through `attempt`, and the first
failure is a warning, after which the run does without it. `error_of` is the only place that catches
whatever goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from kiem.errors import ExitCode, UserError
from kiem.training.devices import Devices

if TYPE_CHECKING:
    from kiem.training.run import Run

T = TypeVar("T")


def error_of(action: Callable[[], object]) -> Exception | SystemExit | None:
    """Does something and returns what went wrong; None if nothing did.

    Ctrl-C is not caught. `SystemExit` is: a library that means to end the program would end a run.
    """
    try:
        action()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - accessories are code of others, too
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
    run: Run, devices: Devices, console: Console, name: str, action: Callable[[], T]
) -> T | None:
    """As `attempt`, for what each process does a share of: all have it in the end, or none."""
    found = attempt(run, console, name, action)
    if not devices.any(found is None):
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
    """Returns an error on one line."""
    if isinstance(error, UserError):
        return f"{error.where}: {error.what}" if error.where else error.what
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _leave_out(run: Run, console: Console, name: str, reason: str) -> None:
    run.left_out.add(name)
    run.warn(console, f"{name} failed ({reason}); the run goes on without it")
