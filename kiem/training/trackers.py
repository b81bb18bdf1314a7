"""Trackers, which also get a run's figures: Weights & Biases, trackio, TensorBoard.

A run keeps its name there when it is resumed, and continues as the same run. Each tracker works in
a thread of its own, so that a slow or hanging service delays no update.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from kiem.config import TrainingOptions
from kiem.core.errors import not_installed
from kiem.core.files import to_json

# The most time that a service that does not answer may cost at the end of a run.
FINISH_SECONDS = 60.0
_MAX_WAITING = 1000
Samples = Sequence[Mapping[str, str]]  # `prompt` and `text`


def open_tracker(
    name: str, options: TrainingOptions, run_directory: Path, config: Mapping[str, Any], step: int
) -> WandbTracker | TensorBoardTracker:
    """Starts one of the trackers that the options name, or continues its run after `step`.

    The run has the name of the run directory; some trackers keep their files there. All have
    `log(step, figures, samples)` for the figures and samples of text of an update, and
    `finish(summary)` for the run's results, None if it was stopped; it sends what is left.

    Raises:
        UserError: the tracker is not installed or refuses.
        Exception: it fails in another way.
    """
    project = options.wandb_project or "kiem"
    try:
        if name == "wandb":
            return WandbTracker(project, run_directory, config)
        if name == "trackio":
            return TrackioTracker(project, run_directory, config)
        return TensorBoardTracker(run_directory, config, step)
    except ImportError as error:
        raise not_installed(name, f"--trackers {name}") from error


class WandbTracker:
    """Weights & Biases; with WANDB_MODE=offline it only writes into the run directory."""

    def __init__(self, project: str, run_directory: Path, config: Mapping[str, Any]):
        import wandb

        self._table: Any = wandb.Table
        name = run_directory.name
        self._run: Any = wandb.init(
            project=project,
            id=name,
            name=name,
            dir=run_directory,
            config=dict(config),
            resume="allow",
        )

    def log(self, step: int, figures: Mapping[str, float], samples: Samples) -> None:
        row: dict[str, Any] = dict(figures)
        if samples:
            rows = [[sample["prompt"], sample["text"]] for sample in samples]
            row["samples"] = self._table(columns=["prompt", "text"], data=rows)
        self._run.log(row, step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)


class TrackioTracker(WandbTracker):
    """trackio, whose interface is that of Weights & Biases; its data stays on this machine."""

    def __init__(self, project: str, run_directory: Path, config: Mapping[str, Any]):
        import trackio

        self._table = trackio.Table
        self._run = trackio.init(
            project,
            run_directory.name,
            config=dict(config),
            resume="allow",
            auto_log_gpu=False,
            auto_log_cpu=False,
            embed=False,
        )

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self.log(summary["steps"], {f"summary/{name}": v for name, v in summary.items()}, ())
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in the run directory's folder tensorboard/."""

    def __init__(self, run_directory: Path, config: Mapping[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = step + 1 if step else None  # drops what came after the checkpoint
        self._writer: Any = SummaryWriter(str(run_directory / "tensorboard"), purge_step=purge_step)
        self._write_text("config", to_json(config), step)

    def log(self, step: int, figures: Mapping[str, float], samples: Samples) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        for sample in samples:
            self._write_text(f"samples/{sample['prompt']}", sample["prompt"] + sample["text"], step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._write_text("summary", to_json(summary), summary["steps"])
        self._writer.close()

    def _write_text(self, name: str, text: str, step: int) -> None:
        # TensorBoard renders Markdown; a code block shows the text of a model as it is.
        block = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer.add_text(name, block, step)


class BackgroundTracker:
    """A tracker in a thread of its own; whatever the tracker raises is raised by the next call.

    From here on only this uses the tracker.
    """

    def __init__(self, tracker: WandbTracker | TensorBoardTracker):
        self._tracker = tracker
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
        samples = figures.get("samples", ())
        if numbers or samples:
            self._put(partial(self._tracker.log, step, numbers, samples))

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
