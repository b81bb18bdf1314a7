"""Ends of a run from outside: signals that ask it to stop, and a process that hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from kiem.core.errors import ExitCode
from kiem.parallel.distributed import Distributed

# A launcher passes Ctrl-C on to processes that got it from the terminal already.
_SAME_REQUEST_SECONDS = 1.0
# An update that takes so long, and so many times the longest before it, will not end.
HANG_SECONDS = 45.0
_HANG_FACTOR = 10
_STEPS_BEFORE_WATCH = 3
# The first update of a process imports and compiles: it says nothing of those that follow.
_STEPS_TO_WARM_UP = 1


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGHUP (the terminal is gone); use it as a context manager.

    A signal asks for a checkpoint and the end of the run after the update, or the batch of an
    evaluation, in progress. A second one ends the process at once. Without checkpoints
    (`is_enabled`) signals end it anyway.
    """

    def __init__(self, distributed: Distributed, *, is_enabled: bool):
        self._distributed = distributed
        self._is_enabled = is_enabled and threading.current_thread() is threading.main_thread()
        self._signal: signal.Signals | None = None
        self._time = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._is_enabled:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def is_asked(self) -> bool:
        """Returns whether any process got a signal; all call this. Once true, it stays so."""
        return self._distributed.any(self._signal is not None)

    @property
    def name(self) -> str:
        """The name of the signal that ends the run."""
        return self._signal.name if self._signal is not None else "a signal to another process"

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._time = signal.Signals(number), now
            if self._distributed.is_main:
                _print(  # not by the console, which may be in the middle of a line
                    f"\n{self._signal.name}: stopping with a checkpoint as soon as possible; "
                    "a second signal stops at once\n"
                )
        elif now - self._time > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)


class HangWatch:
    """Ends this process when an update does not end, as when another process hangs.

    The launcher then ends the others, and restarts all if it may (torchrun --max-restarts). Enabled
    if there are other processes to wait for.
    """

    def __init__(self, *, is_enabled: bool):
        self._is_enabled = is_enabled
        self._timer: threading.Timer | None = None
        self._began: float | None = None
        self._longest = 0.0
        self._num_steps = 0

    def begin(self) -> None:
        """Begins an update, which must end within a limit."""
        self._began = time.monotonic()
        if self._is_enabled and self._num_steps >= _STEPS_BEFORE_WATCH:
            limit = max(HANG_SECONDS, _HANG_FACTOR * self._longest)
            self._timer = threading.Timer(limit, _leave_hung, [limit])
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """Ends an update; what follows may take any time."""
        if self._timer is not None:
            self._timer.cancel()
        if self._began is not None:
            if self._num_steps >= _STEPS_TO_WARM_UP:
                self._longest = max(self._longest, time.monotonic() - self._began)
            self._began = None
            self._num_steps += 1


def _leave_hung(limit: float) -> None:
    _print(
        f"\nerror: an update has not ended for {limit:.0f} seconds\n"
        "  Another process may hang; start again.\n"
    )
    os._exit(ExitCode.HUNG)


def _print(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal can be gone
        os.write(2, message.encode())
