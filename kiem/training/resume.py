"""Resuming: which checkpoint a run continues from, and whether it may."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, already_exists
from kiem.core.files import sha256_file
from kiem.core.json_input import convert
from kiem.core.manifest import MANIFEST_FILE
from kiem.parallel.agreement import check_same
from kiem.parallel.distributed import Distributed
from kiem.training.checkpoint import (
    CHECKPOINTS,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    read_state,
    verify_checkpoint,
)
from kiem.training.run import Run, TrainState


def choose_checkpoint(
    options: TrainingOptions, directory: Path, distributed: Distributed, console: Console
) -> Path | None:
    """Returns the verified checkpoint to resume from, the same in all processes.

    None if the run begins. The main process decides, and warns of damaged checkpoints.

    Raises:
        UserError: the run is finished, --resume names no intact checkpoint, or another run's
            checkpoints are in the way.
    """
    is_named = options.resume not in ("auto", "none")
    with distributed.raise_on_all_ranks():
        if distributed.is_main:
            _check_unfinished(options, directory)
            if is_named:
                verify_checkpoint(Path(options.resume))
    chosen = Path(options.resume) if is_named else None
    if options.resume == "auto":
        chosen = newest_on_all_ranks(directory / CHECKPOINTS, distributed, console)
    if chosen is None:
        return None
    with distributed.raise_on_all_ranks():
        file = chosen / MANIFEST_FILE
        sha256 = sha256_file(file) if file.is_file() else "not found"
    check_same({f"sha256 of {chosen.name}/{MANIFEST_FILE}": sha256}, distributed)
    return chosen


def _check_unfinished(options: TrainingOptions, directory: Path) -> None:
    """Checks that a run directory is not finished and holds no checkpoints of another run."""
    if (directory / "final_model").exists():
        raise already_exists(
            str(directory),
            "this run is finished",
            "Choose another --run-name; to train its model further, use --init-from.",
        )
    folder = directory / CHECKPOINTS
    is_own = options.resume == "auto" or (
        options.resume != "none" and Path(options.resume).parent.resolve() == folder.resolve()
    )
    if not is_own and list_checkpoints(folder):
        raise already_exists(
            str(directory),
            "this run directory holds checkpoints that would be mixed with those of a new run",
            "Choose another --run-name, or resume with --resume auto.",
        )


def check_same_run(
    path: Path,
    state: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    changeable: Mapping[str, Any],
    console: Console,
) -> None:
    """Compares a checkpoint and its state.json with the run; warns of what changes the result.

    Raises:
        UserError: the fingerprint differs: it belongs to another run.
    """
    different = _differences(state["fingerprint"], fingerprint)
    if different:
        raise already_exists(
            str(path),
            f"this checkpoint belongs to another run: {'; '.join(different)}",
            "Use the same options, another --run-name, or --resume none.",
        )
    for change in _differences(state["changeable"], changeable):
        warn(console, f"{change} from here on: the result differs from that of an undisturbed run")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]


def newest_on_all_ranks(folder: Path, distributed: Distributed, console: Console) -> Path | None:
    """Returns `newest_valid` as the main process finds it, in all processes."""
    found = None
    with distributed.raise_on_all_ranks():
        if distributed.is_main:
            found = newest_valid(folder, console)
    name = distributed.broadcast_from_main(found and found.name)
    return folder / name if name else None


def restore(run: Run, checkpoint: Path) -> TrainState:
    """Loads a verified checkpoint into a run's model and optimizers, and returns its state."""
    load_checkpoint(checkpoint, run.model.module, run.optimizers, run.spec.distributed)
    state = convert(
        read_state(checkpoint).get("run"),
        TrainState,
        where=f"{checkpoint}, its state",
        fix="Resume from another checkpoint with --resume PATH.",
        exit_code=ExitCode.DAMAGED,
    )
    state.saved_step = state.step
    return state
