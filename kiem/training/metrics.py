"""What a run writes down about itself: metrics.jsonl always, Weights & Biases when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kiem.errors import ExitCode, UserError
from kiem.files import append_json_line, write_text
from kiem.report.record import METRICS_FILE, read_metrics


class Metrics:
    """Writes one line of figures at a time.

    Args:
        run_directory: where metrics.jsonl is.
        wandb_project: project in Weights & Biases, or None to leave it out.
        run_name: name and id of the run there, so that a resumed run continues.
        config: the run's options, for Weights & Biases.
    """

    def __init__(
        self,
        run_directory: Path,
        wandb_project: str | None,
        run_name: str,
        config: Mapping[str, Any],
    ):
        self._path = run_directory / METRICS_FILE
        self._wandb_run: Any = None
        if wandb_project is not None:
            self._wandb_run = _start_wandb(wandb_project, run_name, run_directory, config)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes figures of an update, counted from 1."""
        append_json_line(self._path, {"step": step, **figures})
        if self._wandb_run is not None:
            self._wandb_run.log(dict(figures), step=step)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Writes what is left, with the run's results as its summary."""
        if self._wandb_run is not None:
            self._wandb_run.summary.update(dict(summary))
            self._wandb_run.finish()


def keep_metrics_until(run_directory: Path, step: int) -> None:
    """Drops the lines of a resumed run that come after its checkpoint: they will come again."""
    path = run_directory / METRICS_FILE
    if path.exists():
        lines, _ = read_metrics(path)
        kept = [line for line in lines if line["step"] <= step and step > 0]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def _start_wandb(
    project: str, run_name: str, run_directory: Path, config: Mapping[str, Any]
) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "the wandb package is not installed",
            where="--use-wandb",
            fix="Install it with: pip install wandb.",
            exit_code=ExitCode.BAD_OPTION,
        ) from error
    try:
        return wandb.init(
            project=project,
            id=run_name,
            name=run_name,
            dir=run_directory,
            config=dict(config),
            resume="allow",
        )
    except (
        wandb.errors.CommError,
        wandb.errors.UsageError,
        wandb.errors.AuthenticationError,
    ) as error:
        raise UserError(
            f"Weights & Biases refuses: {error}",
            where="--use-wandb",
            fix="Log in with 'wandb login', or set WANDB_MODE=offline.",
            exit_code=ExitCode.NETWORK,
        ) from error
