"""The folder beside a chunk directory in which its finished units wait, also for a later run.

What is in either of them is known by its identity: all options and files that its content depends
on. Work on other text or with other options is never taken up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import empty_folder, write_json
from kiem.core.json_input import read_json
from kiem.core.leftovers import discard, hidden, is_removed, recover_folder
from kiem.core.locking import locked_folder
from kiem.data.chunks import DATASET_DICT_FILE, MANIFEST_FILE, read_manifest

# Raised whenever units made by older versions would not be what this one makes.
_UNIT_VERSION = 3
_PLAN_FILE = "plan.json"
# After these, the same command can go on; after others it needs other input or options.
_PASSING = (
    ExitCode.DISK_SPACE,
    ExitCode.NOT_WRITABLE,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.DAMAGED,
)


@contextmanager
def working_folder(folder: Path, identity: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Gives the folder for finished units, which an interrupted run leaves for the next one.

    Args:
        folder: the chunk directory that is to be made.
        identity: what it will be made of.
        overwrite: whether to begin again.

    Raises:
        UserError: another process works there, or an earlier run worked on something else.
    """
    work = _unfinished(folder)
    with locked_folder(work):
        earlier = {} if overwrite else _read_plan(work)
        if overwrite or earlier.get("unit_version") != _UNIT_VERSION:
            empty_folder(work)
            write_json(work / _PLAN_FILE, {"unit_version": _UNIT_VERSION, **identity})
        else:
            refuse_other(work, earlier, identity)
        try:
            yield work
        except UserError as error:
            if error.exit_code not in _PASSING:
                discard(work)
            raise
        discard(work)


def clear_after_kill(folder: Path) -> None:
    """Removes what a run left that was killed after it had finished the chunk directory."""
    work = _unfinished(folder)
    if not is_removed(work):
        with locked_folder(work):
            discard(work)


def earlier_identity(folder: Path) -> dict[str, Any]:
    """Returns what a chunk directory or the unfinished work on it was made of, {} if not there."""
    exists = recover_folder(folder).exists()
    return read_manifest(folder) if exists else _read_plan(_unfinished(folder))


def refuse_foreign(folder: Path) -> None:
    """Raises a UserError if what has this name is no chunk directory, which nobody may replace."""
    is_ours = all((folder / name).is_file() for name in (DATASET_DICT_FILE, MANIFEST_FILE))
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if os.path.lexists(folder) and not is_ours and not is_empty:
        raise UserError(
            "something else than a chunk directory has this name",
            where=str(folder),
            fix="Choose another --name or --output-dir, or remove it if it is a damaged one.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )


def refuse_other(folder: Path, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises a UserError if what is in `folder` is made of other text or with other options."""
    different = [
        f"--{name.replace('_', '-')} was {recorded['options'].get(name)!r}"
        for name, value in identity["options"].items()
        if recorded["options"].get(name) != value
    ]
    if recorded["source"] != identity["source"]:
        different.append(
            f"--source was other text{_changed(recorded['source'], identity['source'])}"
        )
    if different:
        raise UserError(
            f"this was made differently: {'; '.join(different)}",
            where=str(folder),
            fix="Choose another --name, or replace it with --overwrite.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns which files are different, as " (a, b and 3 more)"; "" where that says nothing."""
    earlier, later = before.get("sha256", {}), now.get("sha256", {})
    names = sorted(n for n in {*earlier, *later} if earlier.get(n) != later.get(n))
    if not names or not set(earlier).intersection(later):
        return ""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})"


def identity_digest(identity: dict[str, Any], tokenizer_sha256: str) -> str:
    """Returns what unit files are known by, as 64 hexadecimal digits."""
    content = json.dumps([_UNIT_VERSION, identity, tokenizer_sha256])
    return hashlib.sha256(content.encode()).hexdigest()


def _unfinished(folder: Path) -> Path:
    return hidden(folder, "unfinished")


def _read_plan(work: Path) -> dict[str, Any]:
    """Returns what work is about; {} if it does not say, so that it cannot be taken up."""
    file = work / _PLAN_FILE
    fix = "Begin again with --overwrite."
    kind = dict[str, Any]
    plan = read_json(file, kind, fix=fix, exit_code=ExitCode.DAMAGED) if file.exists() else {}
    return plan if {"unit_version", "options", "source"} <= plan.keys() else {}
