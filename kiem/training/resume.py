"""Resuming and branching: which checkpoint a run continues from, and whether it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, already_exists, bad_option, not_found
from kiem.core.files import sha256_file, write_bytes
from kiem.core.json_input import convert
from kiem.core.manifest import MANIFEST_FILE
from kiem.model.io import hash_weights
from kiem.parallel.agreement import check_same
from kiem.parallel.distributed import Distributed
from kiem.report.record import CONFIG_FILE, METRICS_FILE
from kiem.training.checkpoint import (
    CHECKPOINTS,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    read_state,
    verify_checkpoint,
)
from kiem.training.run import Run, RunSpec, TrainState

# Of what must be the same when a run is resumed, what a branch may have otherwise.
_MAY_BRANCH = ("document_mask", "anneal", "anneal_weights")


def choose_checkpoint(
    options: TrainingOptions, directory: Path, distributed: Distributed, console: Console
) -> Path | None:
    """Returns the verified checkpoint to resume from, the same in all processes.

    None if the run begins. The main process decides, and warns of damaged checkpoints. A branch
    without a checkpoint of its own begins with the one that it branches from.

    Raises:
        UserError: the run is finished, --resume or --branch-from names no intact checkpoint, or
            another run's checkpoints are in the way.
    """
    is_named = options.resume not in ("auto", "none")
    branch_point = options.branch_from and _branch_point(options.branch_from, directory)
    with distributed.raise_on_all_ranks():
        if distributed.is_main:
            _check_unfinished(options, directory)
            if is_named:
                verify_checkpoint(Path(options.resume))
    chosen = Path(options.resume) if is_named else None
    if options.resume == "auto":
        chosen = newest_on_all_ranks(directory / CHECKPOINTS, distributed, console)
    if chosen is None and branch_point:
        with distributed.raise_on_all_ranks():
            if distributed.is_main:
                _verify_branch_point(branch_point)
        chosen = branch_point
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
    different = _differences(_fingerprint(state), fingerprint)
    if different:
        raise already_exists(
            str(path),
            f"this checkpoint belongs to another run: {'; '.join(different)}",
            "Use the same options, another --run-name, or --resume none.",
        )
    for change in _differences(state["changeable"], changeable):
        warn(console, f"{change} from here on: the result differs from that of an undisturbed run")


def _branch_point(text: str, directory: Path) -> Path:
    """Returns the checkpoint that RUN@STEP names, of another run than that of the directory."""
    run, _, step = text.rpartition("@")
    if not run or not (step.isascii() and step.isdecimal() and len(step) < 19):
        fix = "Name a run directory and one of its steps, such as trained_models/first@1000."
        raise bad_option("--branch-from", f"{text!r} is not RUN@STEP", fix)
    if Path(run).resolve() == directory.resolve():
        what = "a run cannot branch from itself"
        raise bad_option("--branch-from", what, "Give the branch another --run-name.")
    return Path(run) / CHECKPOINTS / f"step-{int(step)}"


def _verify_branch_point(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        steps = [path.name.removeprefix("step-") for path in list_checkpoints(checkpoint.parent)]
        fix = f"The run has checkpoints of these steps: {', '.join(steps) or 'none'}."
        raise not_found(str(checkpoint), "no such checkpoint", fix)
    verify_checkpoint(checkpoint)


def is_branch_point(spec: RunSpec, checkpoint: Path) -> bool:
    """Says whether a run begins with this checkpoint of another one."""
    branch = spec.options.branch_from
    return branch is not None and checkpoint == _branch_point(branch, spec.directory)


def find_branch(spec: RunSpec, checkpoint: Path | None) -> dict[str, Any] | None:
    """Returns the record of a branch, whether it begins or goes on; None of other runs.

    Raises:
        UserError: it differs in what has to be the same.
    """
    if checkpoint is None:
        return None
    state = read_state(checkpoint)
    if not is_branch_point(spec, checkpoint):
        return state.get("branched_from")
    fingerprint, before = spec.fingerprint(), _fingerprint(state)
    fixed = {name: value for name, value in fingerprint.items() if name not in _MAY_BRANCH}
    if different := _differences(before, fixed):
        run = checkpoint.parent.parent
        raise bad_option(
            f"--branch-from {spec.options.branch_from}",
            f"a branch cannot differ in this: {'; '.join(different)}",
            f"Give the same options, for example with --config {run / CONFIG_FILE}.",
        )
    differences = _differences(state["changeable"], spec.changeable())
    if before.get("document_mask") != fingerprint["document_mask"]:
        differences.append(f"document_mask is {fingerprint['document_mask']}")
    if any(before.get(name) != fingerprint[name] for name in ("anneal", "anneal_weights")):
        names = [part.name for part in spec.data.mixture.anneal_parts]
        differences.append(f"anneal is {', '.join(names) or 'left out'}")
    return {
        "run": checkpoint.parent.parent.resolve().name,
        "step": state["step"],
        "checkpoint_sha256": sha256_file(checkpoint / MANIFEST_FILE),
        "differences": differences,
    }


def find_first_weights(
    spec: RunSpec, folder: Path | None, checkpoint: Path | None
) -> dict[str, Any] | None:
    """Returns the record of the weights of --init-from, as a run had them at its first start.

    None if it began with random ones. `commit` is the one on the Hub, `sha256` those of the files
    in the `folder` that they were read from just now.
    """
    if checkpoint is not None:
        return read_state(checkpoint).get("first_weights")
    if folder is None:
        return None
    is_of_hub = folder != Path(str(spec.options.init_from))
    return {"commit": folder.name if is_of_hub else None, "sha256": hash_weights(folder)}


def copy_log(checkpoint: Path, directory: Path) -> None:
    """Copies the log of the run that a branch begins with; opening it drops what came later."""
    file = checkpoint.parent.parent / METRICS_FILE
    if not file.is_file():
        what = f"not a run directory: no {METRICS_FILE}"
        raise not_found(str(file.parent), what, "Name the directory of a run with --branch-from.")
    write_bytes(directory / METRICS_FILE, file.read_bytes())


def _fingerprint(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what must stay the same in the run of a state.json, also of an earlier version's."""
    return {"batch_warmup_steps": 0, **state["fingerprint"]}


def keep_batch_warmup(options: TrainingOptions, checkpoint: Path) -> TrainingOptions:
    """Returns the options of a run that goes on: unless one is given, with its batch's warm-up."""
    if options.batch_warmup_steps is not None:
        return options
    before = _fingerprint(read_state(checkpoint))["batch_warmup_steps"]
    return replace(options, batch_warmup_steps=before)


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
