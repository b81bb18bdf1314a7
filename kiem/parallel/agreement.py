"""Checks that all processes of a run have the same options, data, weights and run directory.

Launchers on several machines are started by hand, each with its own command line, clock, disk and
version of kiem. Whatever can be decided once, the main process decides
(`Distributed.broadcast_from_main`); what each must bring along is compared here, so that a
difference is a message and not a hang.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

import kiem
from kiem.config import TrainingOptions
from kiem.core.disk import discard
from kiem.core.errors import bad_option, not_found
from kiem.core.files import make_folder, write_bytes
from kiem.core.values import option_flag
from kiem.model.gemma3 import Gemma3
from kiem.parallel.distributed import Distributed

# The same folder can have another path on another machine; its content is compared instead.
_PATHS = ("dataset_path", "anneal", "output_dir", "init_from", "branch_from")
# Network disks show a new folder to other machines a little later.
_MAX_SECONDS_UNTIL_SEEN = 5.0


def check_same(found: Mapping[str, object], distributed: Distributed) -> None:
    """Checks that every process found what the main one did, by name.

    Raises:
        UserError: a process found something else; names it and what that is.
    """
    found = json.loads(json.dumps(found))  # as what comes from the main process
    of_main = distributed.broadcast_from_main(found)
    with distributed.raise_on_all_ranks():
        for name, main in of_main.items():
            if found[name] != main:
                what = f"is {found[name]!r} here, but {main!r} in process 0"
                fix = "Give the same command on all machines, with the same files."
                raise bad_option(name, what, fix)


def check_same_start(
    options: TrainingOptions, data: Mapping[str, object], model: Gemma3, distributed: Distributed
) -> None:
    """Checks that all processes begin alike: options, version of kiem, chunks, weights.

    Raises:
        UserError: one does not.
    """
    if distributed.world_size == 1:
        return
    # A sum of the bits: the order does not matter, so different processors find the same.
    sums = [
        int(p.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
        for p in model.parameters()
    ]
    found = {
        "version of kiem": kiem.__version__,
        **{option_flag(name): value for name, value in vars(options).items() if name not in _PATHS},
        "sha256 of the chunk directories": data,
        "sum over the weights": sum(sums),
    }
    check_same(found, distributed)


def check_writable(folder: Path, distributed: Distributed) -> None:
    """Checks that all processes can write into the same folder; makes it if it is missing.

    Raises:
        UserError: one cannot.
    """
    # A name that `remove_leftovers` knows, should this be killed.
    meeting = folder / f".meeting.partial-{distributed.broadcast_from_main(uuid.uuid4().hex)}"
    try:
        with distributed.raise_on_all_ranks():
            if distributed.is_main:
                make_folder(meeting)
        with distributed.raise_on_all_ranks():
            ends = time.monotonic() + _MAX_SECONDS_UNTIL_SEEN
            while not meeting.is_dir():
                if time.monotonic() > ends:
                    raise not_found(
                        str(folder),
                        "this is not the folder that process 0 writes into",
                        "All processes write into one run directory: give an --output-dir on a "
                        "disk that all machines share, or save no checkpoints (--save-steps 0).",
                    )
                time.sleep(0.1)
            write_bytes(meeting / str(distributed.rank), b"")
    finally:
        if distributed.is_main:
            discard(meeting)
