"""Checkpoints: all that a run needs to go on, committed in one rename.

checkpoints/step-<n>/
    config.json, model.safetensors   the model, loadable as such
    optimizer.safetensors            the optimizers' moments, by parameter name
    state.json                       step, seconds, what the run is, sha256 of the files
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kiem.errors import ExitCode, UserError
from kiem.files import new_folder, remove_folder, sha256_file, write_json
from kiem.model.files import WEIGHTS_FILE, write_model, write_weights
from kiem.model.gemma3 import Gemma3

_STATE_FILE = "state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"


def save_checkpoint(
    folder: Path,
    step: int,
    model: Gemma3,
    optimizers: Sequence[torch.optim.Optimizer],
    special_ids: dict[str, int],
    state: dict[str, Any],
) -> Path:
    """Commits a checkpoint after update `step` and returns its path.

    Args:
        folder: the run's checkpoints folder.
        step: updates done.
        model, optimizers: what to save.
        special_ids: the tokenizer's "pad", "eos" and "bos".
        state: what else the run needs to go on; `fingerprint` in it must match on resumption.
    """
    path = folder / f"step-{step}"
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
    moments = {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    with new_folder(path, overwrite=path.exists()) as unfinished:
        write_model(model, unfinished, special_ids)
        write_weights(moments, unfinished / _OPTIMIZER_FILE)
        hashes = {name: sha256_file(unfinished / name) for name in (WEIGHTS_FILE, _OPTIMIZER_FILE)}
        write_json(unfinished / _STATE_FILE, {"step": step, **state, "sha256": hashes})
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the committed checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for path in list_checkpoints(folder)[: -keep or None]:
        remove_folder(path)


def load_checkpoint(
    path: Path,
    model: Gemma3,
    optimizers: Sequence[torch.optim.Optimizer],
    fingerprint: dict[str, Any],
) -> dict[str, Any]:
    """Puts a checkpoint's weights and moments into model and optimizers, in place.

    Args:
        path: the checkpoint.
        model, optimizers: freshly made, of the same shape.
        fingerprint: what the run is now; must equal what it was.

    Returns:
        The checkpoint's state.

    Raises:
        UserError: it is damaged, or belongs to another run.
    """
    try:
        state = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            if sha256_file(path / name) != expected:
                raise _damaged(path / name, "its sha256 differs from the one in state.json")
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    different = [
        f"{name} was {state['fingerprint'].get(name)!r}, is {value!r}"
        for name, value in fingerprint.items()
        if state["fingerprint"].get(name) != value
    ]
    if different:
        raise UserError(
            f"this checkpoint belongs to another run: {'; '.join(different)}",
            where=str(path),
            fix="Use the same options, another --run-name, or --resume none.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path / WEIGHTS_FILE).items():
            parameters[name].copy_(value)
    states = {
        parameter: optimizer.state
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for full_name, value in load_file(path / _OPTIMIZER_FILE).items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        states[parameter][parameter][key] = value.to(parameter.device)
    return dict(state)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"damaged checkpoint: {what}",
        where=str(path),
        fix="Resume from another one with --resume PATH, or start again with --resume none.",
        exit_code=ExitCode.DAMAGED,
    )
