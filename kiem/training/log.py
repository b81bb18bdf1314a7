"""The log of a run: metrics.jsonl, trackers and console; and the calls that may fail.

The weights need data, checkpoints and metrics.jsonl. All else is an accessory and never ends a run:
trackers, samples, report, display ... Before the first update an accessory is tried, where it can
be, and a failure is an error (`try_before`). From then on it is called through `RunLog.attempt`: a
failure is one warning, after which the run does without the accessory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.errors import UserError, bad_option
from kiem.core.files import append_json_lines, fsync_file, write_bytes, write_json, write_text
from kiem.core.yaml_options import to_dict, to_yaml
from kiem.parallel.distributed import Distributed
from kiem.planning.recipe import tracker_names
from kiem.report.record import CONFIG_FILE, METADATA_FILE, METRICS_FILE, read_metrics
from kiem.training.trackers import BackgroundTracker, open_tracker

T = TypeVar("T")
_MAX_CHARACTERS = 1000


class RunLog:
    """The log of a run, which only the main process writes; that one opens it before use.

    Args:
        directory: the run directory.
        distributed: all processes.
        console: where warnings and accessories print.
        stops_run: whether a line that the disk refuses ends the run; else it is written later.

    Attributes:
        step: the update that lines belong to, which the training loop sets.
    """

    def __init__(
        self, directory: Path, distributed: Distributed, console: Console, *, stops_run: bool
    ):
        self.step = 0
        self.console = console
        self._directory = directory
        self._path = directory / METRICS_FILE
        self._distributed = distributed
        self._stops_run = stops_run
        self._waiting: list[dict[str, Any]] = []
        self._refusal: UserError | None = None
        self._trackers: dict[str, BackgroundTracker] = {}
        self._failed: set[str] = set()

    def open(
        self, options: TrainingOptions, metadata: Mapping[str, Any], *, repeats_evaluation: bool
    ) -> None:
        """Writes config.yaml and run.json, ends an older log at `step`, and starts the trackers.

        Args:
            options: all options of training.py.
            metadata: the content of run.json.
            repeats_evaluation: whether the run goes on with the evaluation after `step`.

        Raises:
            UserError: the disk refuses, or a tracker does not start. When a launcher restarts the
                run, that is a warning: no user is there to correct it.
        """
        write_text(self._directory / CONFIG_FILE, to_yaml(options))
        write_json(self._directory / METADATA_FILE, metadata)
        self._shorten(repeats_evaluation)
        config = {**to_dict(options), **metadata}
        is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        for name in tracker_names(options):
            start = partial(open_tracker, name, options, self._directory, config, self.step)
            tracker = (
                self.attempt(name, start)
                if is_restarted
                else try_before(f"--trackers {name}", start)
            )
            if tracker is not None:
                self._trackers[name] = BackgroundTracker(tracker)

    def write(self, figures: Mapping[str, Any]) -> None:
        """Writes a line of metrics.jsonl, and sends the figures to the trackers.

        JSON has no infinity or NaN: they are left out. A line that the disk refuses is written
        with the next one.
        """
        if not self._distributed.is_main:
            return
        finite = {
            name: value
            for name, value in figures.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        self._waiting.append({"step": self.step, **finite})
        try:
            append_json_lines(self._path, self._waiting)
            self._waiting, self._refusal = [], None
        except UserError as error:
            if self._refusal is None and not self._stops_run:
                self._say(f"{error.where}: {error.what}; its lines wait in memory")
            self._refusal = error
        for name, tracker in self._trackers.items():
            self.attempt(name, partial(tracker.send, self.step, finite))

    def warn(self, message: str) -> None:
        """Writes a warning to metrics.jsonl and the screen."""
        self.write({"warning": message})
        self._say(message)

    def warn_of(self, name: str, look: Callable[[], Iterable[str]]) -> None:
        """Warns of what `look` finds; `name` as in `attempt`."""
        for message in self.attempt(name, lambda: [*look()]) or []:
            self.warn(message)

    def raise_refusal(self) -> None:
        """Raises the disk's refusal of a line if that is to end the run."""
        if self._refusal is not None and self._stops_run:
            raise self._refusal

    def sync(self) -> None:
        """Waits until metrics.jsonl has reached the disk."""
        if self._distributed.is_main and self._path.exists():
            fsync_file(self._path)

    def rewind(self, step: int) -> None:
        """Goes back to an update, and removes the lines after it, which will be repeated."""
        self.step = step
        self._waiting = [line for line in self._waiting if line["step"] <= step]
        if self._distributed.is_main:
            # Readers know repeated steps, so this only makes the log shorter.
            self.attempt("shortening the log", self._shorten)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Gives the trackers the run's results, None if it was stopped, and ends them."""
        for name, tracker in self._trackers.items():
            self.attempt(name, partial(tracker.finish, summary))

    def attempt(self, name: str, action: Callable[[], T]) -> T | None:
        """Returns what `action` does, which the weights do not need; None if it fails.

        A failure is a warning with this name. A name that has failed is not tried again. The action
        must not wait for other processes.
        """
        if name in self._failed:
            return None
        try:
            return action()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - of Rust, asyncio, or SystemExit of a library
            self._leave_out(name, _in_words(error))
            return None

    def attempt_on_all_ranks(self, name: str, action: Callable[[], T]) -> T | None:
        """As `attempt`, for work that is divided: all processes succeed, or none."""
        found = self.attempt(name, action)
        if not self._distributed.any(found is None):
            return found
        if name not in self._failed:
            self._leave_out(name, "in another process")
        return None

    def _leave_out(self, name: str, reason: str) -> None:
        self._failed.add(name)
        self.warn(f"{name} failed ({reason}); the run goes on without it")

    def _say(self, message: str) -> None:
        with contextlib.suppress(Exception):  # the screen may be what failed
            warn(self.console, message)

    def _shorten(self, repeats_evaluation: bool = False) -> None:
        """Removes the lines after a checkpoint's step, or its evaluation, that will be repeated."""
        if not self._path.exists():
            return
        step = self.step
        kept = [
            line
            for line in read_metrics(self._path, dict[str, Any])[0]
            if step > 0
            and line["step"] <= step
            and not (repeats_evaluation and line["step"] == step and "samples" in line)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        write_bytes(self._path, text.encode(errors="replace"))


def try_before(where: str, action: Callable[[], T]) -> T:
    """Does before the first update what may only warn later.

    Raises:
        UserError: it fails; names the option `where`.
    """
    try:
        return action()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        fix = "Correct that, or leave the option out: the weights do not depend on it."
        raise bad_option(where, f"does not work here ({_in_words(error)})", fix) from error


def _in_words(error: BaseException) -> str:
    """Returns an error on one line that is not long and can be written as UTF-8."""
    is_ours = isinstance(error, UserError)
    # Python's own words also cover errors whose str() fails.
    text = str(error) if is_ours else traceback.format_exception_only(error)[0]
    return text.splitlines()[0].encode(errors="replace").decode()[:_MAX_CHARACTERS]
