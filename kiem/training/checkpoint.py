"""Checkpoints: all that a run needs to continue, committed in one rename, never overwritten.

checkpoints/step-<n>/
    config.json, model.safetensors           the model, loadable as such
    optimizer-00001-of-00002.safetensors     by process: its part of the moments
    random-00001-of-00002.safetensors        by process: the states of torch's random generators
    state.json                               TrainState, and what the run is
    manifest.json                            size and sha256 of every file, written last

All processes write into one folder, so those of several machines need a shared file system.
"""

from __future__ import annotations

import contextlib
import re
from collections import ChainMap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError, damaged, not_found
from kiem.core.files import move_folder, new_folder, remove_folder, write_json
from kiem.core.json_input import read_json
from kiem.core.manifest import verify_manifest, write_manifest
from kiem.model.gemma3 import Gemma3
from kiem.model.io import WEIGHTS_FILE, write_model, write_weights
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import (
    copy_full_tensor,
    full_model,
    full_tensor,
    owners,
)

CHECKPOINTS = "checkpoints"
_STATE_FILE = "state.json"
_ASIDE = "aside-"
_FIX = "Resume from another checkpoint with --resume PATH, or start with another --run-name."


def save_checkpoint(
    folder: Path,
    model: Gemma3,
    optimizers: Sequence[torch.optim.Optimizer],
    special_ids: dict[str, int],
    state: dict[str, Any],
    distributed: Distributed,
) -> Path:
    """Commits a checkpoint and returns its path; all processes call it and all succeed or fail.

    Args:
        folder: the run's checkpoints folder.
        model, optimizers: what to save; each process saves its part of the moments.
        special_ids: the tokenizer's "pad", "eos" and "bos".
        state: the content of state.json; its `step` gives the checkpoint its name.
        distributed: all processes.

    Raises:
        UserError: a process could not write; nothing is left of the checkpoint then.
    """
    path = folder / f"step-{state['step']}"
    unfinished = folder / f".{path.name}.partial"  # the same for all processes
    own = {
        "optimizer": _own_moments(model, optimizers, distributed),
        "random": _random_states(distributed),
    }
    full = full_model(model, torch.device("cpu"), is_kept=distributed.is_main)
    hashes: dict[str, str] = {}
    with contextlib.ExitStack() as commit:
        with distributed.raise_on_all_ranks():
            if distributed.is_main:
                # It exists if a commit failed at the very end, or if only its evaluation is new.
                exists = path.exists()
                commit.enter_context(new_folder(path, overwrite=exists, temporary=unfinished))
        # Side by side: one core computes SHA-256 no faster than a good disk writes.
        with distributed.raise_on_all_ranks(), ThreadPoolExecutor() as pool:
            suffix = f"{distributed.rank + 1:05d}-of-{distributed.world_size:05d}.safetensors"
            writing = {
                f"{kind}-{suffix}": pool.submit(
                    write_weights, tensors, unfinished / f"{kind}-{suffix}"
                )
                for kind, tensors in own.items()
            }
            if distributed.is_main:
                hashes = write_model(full, unfinished, special_ids)
                write_json(unfinished / _STATE_FILE, state)
            hashes |= {name: written.result() for name, written in writing.items()}
        # Each process knows the hashes of the files it wrote; the manifest needs all.
        all_hashes = distributed.all_gather(hashes)
        with distributed.raise_on_all_ranks():
            if distributed.is_main:
                write_manifest(unfinished, dict(ChainMap(*all_hashes)))
                commit.close()
    return path


def load_checkpoint(
    path: Path, model: Gemma3, optimizers: Sequence[torch.optim.Optimizer], distributed: Distributed
) -> None:
    """Loads the weights, moments and random states of a verified checkpoint.

    Every process takes what it holds, however many processes wrote it.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path / WEIGHTS_FILE).items():
            copy_full_tensor(parameters[name], value)
    states = {p: values for optimizer in optimizers for p, values in optimizer.state.items()}
    for file in sorted(path.glob("optimizer-*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for full_name in saved.keys():  # noqa: SIM118 - it is not a dict
                name, key = full_name.rsplit("/", 1)
                parameter = parameters[name]
                if parameter in states:
                    copy_full_tensor(states[parameter][key], saved.get_tensor(full_name))
    for file in path.glob(f"random-{distributed.rank + 1:05d}-of-*.safetensors"):
        random = load_file(file)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and distributed.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"])


def read_state(path: Path) -> dict[str, Any]:
    """Returns the state.json of a verified checkpoint."""
    return read_json(path / _STATE_FILE, dict[str, Any], fix=_FIX, exit_code=ExitCode.DAMAGED)


def verify_checkpoint(path: Path) -> None:
    """Checks every byte of a checkpoint.

    Raises:
        UserError: it is missing or damaged; names the file.
    """
    if not path.is_dir():
        fix = "Name a folder such as RUN/checkpoints/step-100 with --resume."
        raise not_found(str(path), "no such checkpoint", fix)
    verify_manifest(path, _FIX)


def newest_valid(folder: Path, console: Console) -> Path | None:
    """Returns the newest intact checkpoint, None if there are none; warns of damaged ones.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            verify_checkpoint(path)
        except UserError as error:
            warn(console, f"{error.where}: {error.what}; this checkpoint is skipped")
        else:
            return path
    if checkpoints:
        fix = "Start again with another --run-name."
        raise damaged(str(folder), "none of the checkpoints is intact", fix)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the committed checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=_step_of)


def set_aside_after(folder: Path, step: int) -> None:
    """Renames the checkpoints after `step`: they are damaged, or the run resumed from an older one.

    The next save removes them.
    """
    for path in list_checkpoints(folder):
        if _step_of(path) > step:
            move_folder(path, _ASIDE + path.name)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best: that of the lowest test loss."""
    checkpoints = list_checkpoints(folder)
    kept = checkpoints[-keep:]
    losses = {path: loss for path in checkpoints if (loss := _test_loss(path)) is not None}
    if losses:
        kept.append(min(losses, key=lambda path: losses[path]))
    for path in [*checkpoints, *folder.glob(f"{_ASIDE}step-*")]:
        if path not in kept:
            remove_folder(path)


def _test_loss(path: Path) -> float | None:
    """Returns the latest test loss of a checkpoint; None if there is none or it is damaged."""
    try:
        return read_state(path)["run"]["test_loss"]
    except (UserError, KeyError, TypeError):
        return None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _own_moments(
    model: Gemma3, optimizers: Sequence[torch.optim.Optimizer], distributed: Distributed
) -> dict[str, Tensor]:
    """Returns the moments that this process saves, unsharded.

    Each saves those of its own parameters, as `owners` deals them out, whoever holds them.
    """
    states = {p: values for optimizer in optimizers for p, values in optimizer.state.items()}
    dealt = owners(model, distributed.world_size)
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in states.get(parameter, {}).items():
            whole = full_tensor(value, torch.device("cpu"))
            if dealt[name] == distributed.rank:
                found[f"{name}/{key}"] = whole
    return found


def _random_states(distributed: Distributed) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if distributed.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states
