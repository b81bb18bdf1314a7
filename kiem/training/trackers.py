"""Trackers, which also get a run's figures: Weights & Biases, trackio, TensorBoard.

A run keeps its name there when it is resumed, and continues as the same run. Each tracker works in
a thread of its own, so that a slow or hanging service delays no update.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError, not_installed

DEFAULT_PROJECT = "kiem"
# The most time that a service that does not answer may cost at the end of a run.
FINISH_SECONDS = 60.0
_MAX_WAITING = 1000
_SAMPLE_COLUMNS = ["step", "prompt", "text"]
Sample = tuple[int, str, str]


class Tracker(Protocol):
    """What training asks of a tracker."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of an update or an evaluation."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Takes the (step, prompt, text) of all samples so far; those of `step` are new."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Takes the results of the run, None if it was stopped, and sends what is left."""


def open_tracker(
    name: str, options: TrainingOptions, run_directory: Path, config: Mapping[str, Any], step: int
) -> Tracker:
    """Starts one of the trackers that the options name, or continues its run after `step`.

    The run has the name of the run directory; some trackers keep their files there.

    Raises:
        UserError: the tracker is not installed or refuses.
        Exception: it fails in another way.
    """
    project = options.wandb_project or DEFAULT_PROJECT
    if name == "wandb":
        return WandbTracker(project, run_directory, config)
    if name == "trackio":
        return TrackioTracker(project, run_directory, config)
    return TensorBoardTracker(run_directory, config, step)


class WandbTracker:
    """Weights & Biases; with WANDB_MODE=offline it only writes into the run directory."""

    def __init__(self, project: str, run_directory: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise not_installed("wandb", "--use-wandb") from error
        self._table: Any = wandb.Table
        name, errors = run_directory.name, wandb.errors
        given: dict[str, Any] = {"id": name, "name": name, "dir": run_directory}
        try:
            self._run: Any = wandb.init(
                project=project, config=dict(config), resume="allow", **given
            )
        except (errors.CommError, errors.UsageError, errors.AuthenticationError) as error:
            raise UserError(
                f"Weights & Biases refuses: {error}",
                where="--use-wandb",
                fix="Log in with 'wandb login', or set WANDB_MODE=offline.",
                exit_code=ExitCode.NETWORK,
            ) from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        rows = [list(sample) for sample in samples]
        self._run.log({"samples": self._table(columns=_SAMPLE_COLUMNS, data=rows)}, step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)


class TrackioTracker(WandbTracker):
    """trackio, whose interface is that of Weights & Biases; its data stays on this machine."""

    def __init__(self, project: str, run_directory: Path, config: Mapping[str, Any]):
        try:
            import trackio
        except ImportError as error:
            raise not_installed("trackio", "--trackers trackio") from error
        self._table = trackio.Table
        given: dict[str, Any] = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        name = run_directory.name
        self._run = trackio.init(project, name, config=dict(config), resume="allow", **given)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.log(summary["steps"], {f"summary/{name}": v for name, v in summary.items()})
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in the run directory's folder tensorboard/."""

    def __init__(self, run_directory: Path, config: Mapping[str, Any], step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise not_installed("tensorboard", "--trackers tensorboard") from error
        purge_step = step + 1 if step else None  # drops what came after the checkpoint
        self._writer: Any = SummaryWriter(str(run_directory / "tensorboard"), purge_step=purge_step)
        self._write_text("config", _pretty(config), step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample_step, prompt, text in samples:
            if sample_step == step:
                self._write_text(f"samples/{prompt}", prompt + text, step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._write_text("summary", _pretty(summary), summary["steps"])
        self._writer.close()

    def _write_text(self, name: str, text: str, step: int) -> None:
        # TensorBoard renders Markdown; a code block shows the text of a model as it is.
        block = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer.add_text(name, block, step)


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


class BackgroundTracker:
    """A tracker in a thread of its own; whatever the tracker raises is raised by the next call.

    Args:
        tracker: the tracker; from here on only this uses it.
        lines: of metrics.jsonl so far, with samples for the tracker to show again.
    """

    def __init__(self, tracker: Tracker, lines: Iterable[Mapping[str, Any]]):
        self._tracker = tracker
        self._samples = [
            (line["step"], sample["prompt"], sample["text"])
            for line in lines
            for sample in line.get("samples", ())
        ]
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._error: BaseException | None = None
        # A daemon, so that the program can end while the tracker hangs.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def send(self, step: int, figures: Mapping[str, Any]) -> None:
        """Queues a line of metrics.jsonl; raises a TimeoutError if the tracker is too slow."""
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for name, entry in figures.get("per_source", {}).items():
            numbers[f"test_bpb/{name}"] = entry["bpb"]
        if numbers:
            self._put(partial(self._tracker.log, step, numbers))
        if "samples" in figures:
            self._samples += [(step, s["prompt"], s["text"]) for s in figures["samples"]]
            self._put(partial(self._tracker.log_samples, step, list(self._samples)))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Gives the tracker the run's results, None if it was stopped, and waits until it is done.

        Raises a TimeoutError if that takes too long.
        """
        self._put(partial(self._tracker.finish, summary))
        self._waiting.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"it has not ended within {FINISH_SECONDS:.0f} seconds")
        self._raise_error()

    def _put(self, call: Callable[[], None]) -> None:
        self._raise_error()
        if self._waiting.qsize() >= _MAX_WAITING:
            raise TimeoutError(f"it is too slow: {_MAX_WAITING} calls are waiting")
        self._waiting.put(call)

    def _raise_error(self) -> None:
        if isinstance(self._error, KeyboardInterrupt):  # in a thread: nobody has pressed a key
            raise RuntimeError("it was interrupted") from self._error
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (call := self._waiting.get()) is not None:
                call()
        except BaseException as error:  # noqa: BLE001 - a library raises whatever it likes
            self._error = error
