"""What all processes of a run must have in common, checked before any of them works.

Launchers on several machines are started by hand, each with its own command line, clock, disk and
version of kiem. What can be decided once is decided by the first process
(`Distributed.first_tells`); what each must bring along is compared here, so that a difference is
a message and not a wait.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

import kiem
from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import make_folder, remove_folder, write_bytes
from kiem.core.yaml_options import to_dict
from kiem.model.gemma3 import Gemma3
from kiem.parallel.distributed import Distributed

# The same folder can have another path on another machine; what is in it is compared instead.
_PATHS = ("dataset_path", "output_dir", "init_from")
# Network disks show a new folder to other machines a little later.
_MOST_SECONDS_UNTIL_SEEN = 5.0


def check_same(found: Mapping[str, object], fix: str, distributed: Distributed) -> None:
    """Checks that every process found what the first one did.

    Args:
        found: values that JSON has, by what they are called for people; the same names everywhere.
        fix: what to do about a difference.
        distributed: all processes.

    Raises:
        UserError: a process found something else; names it and what that is.
    """
    if distributed.world_size == 1:
        return
    of_first = json.loads(distributed.first_tells(json.dumps(found)))
    with distributed.raise_on_all_ranks():
        for name in sorted({*of_first, *found}):
            own, first = found.get(name), of_first.get(name)
            if json.loads(json.dumps(own)) != first:
                raise UserError(
                    f"is {own!r} here, but {first!r} in process 0",
                    where=name,
                    fix=fix,
                    exit_code=ExitCode.BAD_OPTION,
                )


def check_same_command(options: TrainingOptions, distributed: Distributed) -> None:
    """Checks that every process was given the same options, and is of the same kiem.

    Raises:
        UserError: one was not.
    """
    given = {f"--{name.replace('_', '-')}": v for name, v in to_dict(options).items()}
    for name in _PATHS:
        given.pop(f"--{name.replace('_', '-')}", None)
    given["version of kiem"] = kiem.__version__
    check_same(given, "Give the same command on all machines.", distributed)


def check_same_weights(model: Gemma3, distributed: Distributed) -> None:
    """Checks that every process begins with the same weights.

    Raises:
        UserError: one does not.
    """
    if distributed.world_size == 1:
        return
    # A sum of the bits: the order does not matter, so processors of another kind find the same.
    sums = [
        int(p.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
        for p in model.parameters()
    ]
    fix = "Give all machines the same model with --init-from."
    check_same({"sum over the weights": sum(sums)}, fix, distributed)


def check_writable(folder: Path, distributed: Distributed) -> None:
    """Checks that all processes can write into one and the same folder; makes it if need be.

    Raises:
        UserError: one cannot.
    """
    # A name that `remove_leftovers` knows, should this be killed.
    meeting = folder / f".meeting.partial-{distributed.first_tells(uuid.uuid4().hex)}"
    try:
        with distributed.raise_on_all_ranks():
            if distributed.is_main:
                make_folder(meeting)
        with distributed.raise_on_all_ranks():
            if not _appears(meeting):
                raise UserError(
                    "this is not the folder that process 0 writes into",
                    where=str(folder),
                    fix="All processes write into one run directory: give --output-dir on a disk "
                    "that all machines share, or do without checkpoints with --save-steps 0.",
                    exit_code=ExitCode.NOT_FOUND,
                )
            write_bytes(meeting / str(distributed.rank), b"")
    finally:
        if distributed.is_main:
            with contextlib.suppress(UserError):  # the next start removes it
                remove_folder(meeting)


def _appears(folder: Path) -> bool:
    ends = time.monotonic() + _MOST_SECONDS_UNTIL_SEEN
    while not folder.is_dir():
        if time.monotonic() > ends:
            return False
        time.sleep(0.1)
    return True
