"""Saves checkpoints while fault_shim.c, preloaded, fails every single call that a save makes."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

from disk_shim import NEVER, OPERATIONS, SHORT, Shim
from test_checkpoint import QUIET, distributed, made, names, save

from kiem.core.errors import ExitCode, UserError
from kiem.training.checkpoint import load_checkpoint, newest_valid, prune_checkpoints


def main(library: str, folder: Path) -> None:
    shim = Shim(library, folder)
    for name in ("write", "fsync", "rename"):
        operation = OPERATIONS.index(name)
        kinds = [errno.ENOSPC, errno.EIO, *([SHORT] if name == "write" else [])]
        fresh(folder)
        shim.arm(operation, NEVER, errno.EIO)
        save(folder, 2)
        prune_checkpoints(folder, 1)
        num_calls = shim.num_calls
        assert num_calls > 1
        for call in range(num_calls):
            for kind in kinds:
                fresh(folder)
                shim.arm(operation, call, kind)
                outcome = try_to_save(folder)
                shim.arm(operation, NEVER, errno.EIO)
                check(folder, outcome, is_failure=kind != SHORT)
        print(f"{name}: {num_calls} calls x {len(kinds)} faults")


def fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    save(folder, 1)


def try_to_save(folder: Path) -> UserError | None:
    try:
        save(folder, 2)
        prune_checkpoints(folder, 1)
    except UserError as error:
        return error
    return None


def check(folder: Path, outcome: UserError | None, is_failure: bool) -> None:
    """The last checkpoint is whole, the message names the place, and the next save succeeds."""
    assert (outcome is not None) == is_failure
    if outcome is not None:
        assert outcome.exit_code in (ExitCode.DISK_SPACE, ExitCode.NOT_WRITABLE)
        assert str(folder) in str(outcome.where)
    last = newest_valid(folder, QUIET)
    assert last is not None
    assert last.name in ("step-1", "step-2")
    model, optimizers = made()
    load_checkpoint(last, model, optimizers, distributed())
    save(folder, 3)
    prune_checkpoints(folder, 1)
    assert names(folder) == ["step-3"], names(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
