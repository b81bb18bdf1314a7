"""Which run it is, which checkpoint it goes on from, and whether it may."""

from __future__ import annotations

import math
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import require_free_space, sha256_file
from kiem.core.manifest import MANIFEST_FILE
from kiem.core.values import check_name
from kiem.model.config import read_config
from kiem.parallel.agreement import check_same
from kiem.parallel.distributed import Distributed
from kiem.planning.recipe import SECONDS_BETWEEN_SAVES, Recipe
from kiem.training.checkpoint import CHECKPOINTS, list_checkpoints, newest_valid, verify_checkpoint

# The options with other values of which a run can go on, with another result.
CHANGEABLE = (
    *("max_steps", "max_minutes", "epochs"),
    *("learning_rate", "schedule", "warmup_ratio"),
    *("weight_decay", "max_grad_norm", "z_loss", "spike_sigmas"),
)
_NONE = -1


def run_name(options: TrainingOptions, model_name: str) -> str:
    """Returns the name of the run directory: as asked, or with the time at which all started.

    The first process decides: every launcher has its own clock.
    """
    if options.run_name is not None:
        return check_name(options.run_name, "--run-name")
    started = datetime.now(timezone.utc)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # All processes of a launcher, and those that it starts again, work on one run.
        launcher = psutil.Process(os.getppid())
        started = datetime.fromtimestamp(launcher.create_time(), timezone.utc)
    return f"{model_name}-dutch-{started:%Y%m%dT%H%M%SZ}"


def choose_checkpoint(
    options: TrainingOptions, directory: Path, distributed: Distributed, console: Console
) -> Path | None:
    """Returns the checkpoint to go on from, verified, the same in all processes.

    Args:
        options: all options of training.py.
        directory: the run directory.
        distributed: all processes; the first one decides.
        console: where it is said that a damaged checkpoint is skipped.

    Returns:
        Its path; None if the run begins.

    Raises:
        UserError: the run is finished, --resume names no whole checkpoint, or another run's
            checkpoints are in the way.
    """
    folder = directory / CHECKPOINTS
    chosen: Path | None = None
    with distributed.raise_on_all_ranks():
        if distributed.is_main:
            chosen = _choose(options, directory, folder, console)
    if options.resume in ("auto", "none"):
        step = int(chosen.name.removeprefix("step-")) if chosen is not None else _NONE
        step = int(distributed.broadcast_from_main(step))
        chosen = folder / f"step-{step}" if step != _NONE else None
    else:
        chosen = Path(options.resume)
    if chosen is not None:
        _check_seen_by_all(chosen, distributed)
    return chosen


def _check_seen_by_all(checkpoint: Path, distributed: Distributed) -> None:
    with distributed.raise_on_all_ranks():
        manifest = checkpoint / MANIFEST_FILE
        if not manifest.is_file():
            raise UserError(
                "the checkpoint is not here, but process 0 has it",
                where=str(checkpoint),
                fix="Put it on a disk that all machines share.",
                exit_code=ExitCode.NOT_FOUND,
            )
        sha256 = sha256_file(manifest)
    fix = "Give all machines the same checkpoint."
    check_same({f"sha256 of {checkpoint.name}/{MANIFEST_FILE}": sha256}, fix, distributed)


def _choose(
    options: TrainingOptions, directory: Path, folder: Path, console: Console
) -> Path | None:
    if (directory / "final_model").exists():
        raise UserError(
            "this run is finished",
            where=str(directory),
            fix="Choose another --run-name; to train its model further, use --init-from.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )
    if options.resume == "auto":
        return newest_valid(folder, console)
    is_elsewhere = options.resume == "none" or Path(options.resume).parent.resolve() != (
        folder.resolve()
    )
    if is_elsewhere and list_checkpoints(folder):
        raise UserError(
            "this run directory holds checkpoints that would be mixed with a new run's",
            where=str(directory),
            fix="Choose another --run-name, or go on with --resume auto.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )
    if options.resume == "none":
        return None
    verify_checkpoint(Path(options.resume))
    return Path(options.resume)


def check_space(
    options: TrainingOptions, recipe: Recipe, directory: Path, num_parameters: int
) -> None:
    """Checks that the disk has room for all that a run will write.

    Raises:
        UserError: it has not.
    """
    # The best one is kept as well, and the new one is committed before the oldest goes.
    num_kept = options.save_total_limit + 2
    num_there = len(list_checkpoints(directory / CHECKPOINTS))
    num_new = max(0, min(num_kept - num_there, _most_saves(options, recipe)))
    checkpoints = f"{num_new} checkpoint{'' if num_new == 1 else 's'}"
    needed = 4 * num_parameters * (1 + 3 * num_new)  # a checkpoint has weights and two moments
    require_free_space(directory, needed, f"the model and {checkpoints}")


def _most_saves(options: TrainingOptions, recipe: Recipe) -> int:
    """Returns the most checkpoints that a run can commit, with one for a signal that ends it."""
    if options.save_steps == 0:
        return 0
    limits = []
    if recipe.max_steps is not None:
        of_steps = math.ceil(recipe.max_steps / (options.save_steps or 1)) + 1
        limits.append(min(recipe.max_steps, of_steps))
    if recipe.max_seconds is not None and options.save_steps is None:
        limits.append(int(recipe.max_seconds // SECONDS_BETWEEN_SAVES) + 2)
    return min(limits, default=sys.maxsize)


def check_same_run(
    path: Path,
    state: dict[str, Any],
    fingerprint: dict[str, Any],
    changeable: dict[str, Any],
    console: Console,
) -> None:
    """Refuses a checkpoint of another run; warns of changes that give another result.

    Args:
        path: the checkpoint.
        state: what it was saved with.
        fingerprint: what the run is now, its model's shape included; must equal what it was.
        changeable: what may be different from what it was.
        console: where warnings go.

    Raises:
        UserError: it belongs to another run.
    """
    # Checkpoints of older versions say their model's shape only in the model's own config.json.
    was = {**vars(read_config(path)), **state["fingerprint"]}
    different = _differences(was, fingerprint)
    if different:
        raise UserError(
            f"this checkpoint belongs to another run: {'; '.join(different)}",
            where=str(path),
            fix="Use the same options, another --run-name, or --resume none.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )
    for change in _differences(state["changeable"], changeable):
        warn(console, f"{change} from here on: the result will be another than without the stop")


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {was.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if was.get(name) != value
    ]
