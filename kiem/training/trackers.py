"""Trackers that a run's figures also go to: Weights & Biases, trackio, TensorBoard.

A run keeps its name there when it is resumed and goes on as the same run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError, not_installed

DEFAULT_PROJECT = "kiem"
_SAMPLE_COLUMNS = ["step", "prompt", "text"]


class Tracker(Protocol):
    """What training asks of a tracker."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of an update or an evaluation."""

    def log_samples(self, step: int, samples: Sequence[tuple[int, str, str]]) -> None:
        """Takes the (step, prompt, text) of all samples so far; those of `step` are new."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Takes the results of the run, None if it was stopped, and sends what is left."""


def open_tracker(
    name: str, options: TrainingOptions, run_directory: Path, config: Mapping[str, Any], step: int
) -> Tracker:
    """Starts a tracker, or goes on with it.

    Args:
        name: one of `tracker_names`.
        options: all options of training.py.
        run_directory: its name becomes the run's name; some keep their files in it.
        config: what the run is made of.
        step: the update that the run goes on after, 0 at its start.

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


def tracker_names(options: TrainingOptions) -> list[str]:
    """Returns the trackers that the options name, each once."""
    return sorted({*options.trackers, *(["wandb"] if options.use_wandb else [])})


class WandbTracker:
    """Weights & Biases; with WANDB_MODE=offline it writes into the run directory alone.

    Args:
        project: the project there.
        run_directory: its name is name and id of the run.
        config: what the run is made of.
    """

    def __init__(self, project: str, run_directory: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise not_installed("wandb", "--use-wandb") from error
        self._wandb: ModuleType = wandb
        name = run_directory.name
        given: dict[str, Any] = {"id": name, "name": name, "dir": run_directory}
        refusals = (
            wandb.errors.CommError,
            wandb.errors.UsageError,
            wandb.errors.AuthenticationError,
        )
        try:
            self._run: Any = wandb.init(
                project=project, config=dict(config), resume="allow", **given
            )
        except refusals as error:
            raise UserError(
                f"Weights & Biases refuses: {error}",
                where="--use-wandb",
                fix="Log in with 'wandb login', or set WANDB_MODE=offline.",
                exit_code=ExitCode.NETWORK,
            ) from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes figures; those of a step before the last one sent, it drops."""
        self._run.log(dict(figures), step=step)

    def log_samples(self, step: int, samples: Sequence[tuple[int, str, str]]) -> None:
        """Shows all samples so far as one table."""
        rows = [list(sample) for sample in samples]
        self._run.log({"samples": self._wandb.Table(_SAMPLE_COLUMNS, rows)}, step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Takes the results of the run, None if it was stopped, and sends what is left."""
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)


class TrackioTracker:
    """trackio, which keeps its data on this machine unless told otherwise; as `WandbTracker`."""

    def __init__(self, project: str, run_directory: Path, config: Mapping[str, Any]):
        try:
            import trackio
        except ImportError as error:
            raise not_installed("trackio", "--trackers trackio") from error
        self._trackio: ModuleType = trackio
        given: dict[str, Any] = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        name = run_directory.name
        self._run = trackio.init(project, name, config=dict(config), resume="allow", **given)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of an update or an evaluation."""
        self._run.log(dict(figures), step=step)

    def log_samples(self, step: int, samples: Sequence[tuple[int, str, str]]) -> None:
        """Shows all samples so far as one table."""
        rows = [list(sample) for sample in samples]
        table = self._trackio.Table(columns=_SAMPLE_COLUMNS, data=rows)
        self._run.log({"samples": table}, step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Takes the results of the run, as figures of its last update, and writes what is left."""
        if summary is not None:
            results = {f"summary/{name}": value for name, value in summary.items()}
            self._run.log(results, step=summary["steps"])
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in the run directory's folder tensorboard/.

    Args:
        run_directory: where.
        config: what the run is made of.
        step: the update that the run goes on after; TensorBoard then drops what came later.
    """

    def __init__(self, run_directory: Path, config: Mapping[str, Any], step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise not_installed("tensorboard", "--trackers tensorboard") from error
        self._writer: Any = SummaryWriter(
            str(run_directory / "tensorboard"), purge_step=step + 1 if step else None
        )
        self._write_text("config", _pretty(config), step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of an update or an evaluation."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: Sequence[tuple[int, str, str]]) -> None:
        """Takes the samples of this step, by prompt."""
        for sample_step, prompt, text in samples:
            if sample_step == step:
                self._write_text(f"samples/{prompt}", prompt + text, step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Takes the results of the run, None if it was stopped, and writes what is left."""
        if summary is not None:
            self._write_text("summary", _pretty(summary), summary["steps"])
        self._writer.close()

    def _write_text(self, name: str, text: str, step: int) -> None:
        # TensorBoard reads Markdown; a code block shows whatever a model writes as it is.
        block = "".join(f"    {line}\n" for line in text.splitlines())
        self._writer.add_text(name, block, step)


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
