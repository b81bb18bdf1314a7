"""Trackers in threads of their own: a service that is slow or hangs holds up no update."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import Any

from kiem.training.accessories import error_of
from kiem.training.metrics import finite
from kiem.training.trackers import Tracker

_MOST_WAITING = 1000
# What a service that does not answer may cost at the end of a run.
FINISH_SECONDS = 60.0


class BackgroundTracker:
    """Hands a tracker what it is sent, one after the other and as fast as that takes it.

    An error of the tracker is raised by the next call.

    Args:
        tracker: the tracker; from here on only this uses it.
        lines: of metrics.jsonl so far, with the samples that the tracker is to show again.
    """

    def __init__(self, tracker: Tracker, lines: Iterable[Mapping[str, Any]]):
        self._tracker = tracker
        self._samples: list[tuple[int, str, str]] = []
        for line in lines:
            error_of(partial(self._remember_samples, line["step"], line))  # damaged ones, too
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._error: BaseException | None = None
        # A daemon, so that the program can end while the tracker hangs.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def send(self, step: int, figures: Mapping[str, Any]) -> None:
        """Takes what is written into metrics.jsonl.

        Raises:
            Exception: whatever the tracker has raised.
            TimeoutError: it does not keep up.
        """
        numbers = {
            name: value for name, value in finite(figures).items() if isinstance(value, int | float)
        }
        for name, entry in figures.get("per_source", {}).items():
            numbers[f"test_bpb/{name}"] = entry["bpb"]
        if numbers:
            self._put(partial(self._tracker.log, step, numbers))
        if "samples" in figures:
            self._remember_samples(step, figures)
            self._put(partial(self._tracker.log_samples, step, list(self._samples)))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Gives the tracker the run's results, None if it was stopped, and waits for its end.

        Raises:
            Exception: whatever the tracker has raised.
            TimeoutError: it does not come to its end.
        """
        self._put(partial(self._tracker.finish, summary))
        self._waiting.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"it has not ended within {FINISH_SECONDS:.0f} seconds")
        self._raise_error()

    def _put(self, call: Callable[[], None]) -> None:
        self._raise_error()
        if self._waiting.qsize() >= _MOST_WAITING:
            raise TimeoutError(f"it does not keep up: {_MOST_WAITING} calls wait for it")
        self._waiting.put(call)

    def _raise_error(self) -> None:
        if isinstance(self._error, KeyboardInterrupt):  # in a thread: nobody has pressed a key
            raise RuntimeError("it was interrupted") from self._error
        if self._error is not None:
            raise self._error

    def _remember_samples(self, step: int, figures: Mapping[str, Any]) -> None:
        for sample in figures.get("samples", ()):
            self._samples.append((step, sample["prompt"], sample["text"]))

    def _work(self) -> None:
        while self._error is None and (call := self._waiting.get()) is not None:
            self._error = error_of(call)
