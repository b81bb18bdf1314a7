"""The work directory beside a chunk directory, which keeps finished units for a later run.

Both have an identity: all options and files that their content depends on. A run with another
identity never resumes the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kiem.core.disk import discard, hidden, is_removed
from kiem.core.errors import ExitCode, UserError, already_exists
from kiem.core.files import empty_folder, write_json
from kiem.core.json_input import read_json
from kiem.core.locking import locked_folder
from kiem.core.manifest import MANIFEST_FILE
from kiem.core.values import option_flag
from kiem.data.chunks import DATASET_DICT_FILE, read_manifest
from kiem.data.prepare.units import UNIT_VERSION
from kiem.data.prepare.verify import verify_directory

_PLAN_FILE = "plan.json"
# After these errors the same command can resume; after others it needs other input or options.
_RESUMABLE = (
    *(ExitCode.DISK_SPACE, ExitCode.NOT_WRITABLE, ExitCode.OUT_OF_MEMORY, ExitCode.DAMAGED),
    *(ExitCode.NETWORK, ExitCode.HUB_LOGIN, ExitCode.HUB_LICENCE),
)


@contextmanager
def work_directory(
    folder: Path, identity: dict[str, Any], overwrite: bool
) -> Iterator[Path | None]:
    """Yields the work directory of a chunk directory, which an interrupted run leaves to the next.

    Yields None if the chunk directory exists, which is then verified. Raises a UserError if another
    process works there, or an earlier run had another identity.
    """
    work = hidden(folder, "unfinished")
    _refuse_foreign(folder)

    def is_made() -> bool:
        if overwrite or not folder.exists():
            return False
        _refuse_other(folder, read_manifest(folder), identity)
        verify_directory(folder)
        return True

    if is_made() and is_removed(work):
        yield None
        return
    with locked_folder(work):
        if is_made():  # by a run that was killed after that, or that had the lock
            yield None
            discard(work)
            return
        earlier = {} if overwrite else _read_plan(work)
        if earlier.get("unit_version") == UNIT_VERSION:
            _refuse_other(work, earlier, identity)
        else:
            empty_folder(work)
            write_json(work / _PLAN_FILE, {"unit_version": UNIT_VERSION, **identity})
        try:
            yield work
        except UserError as error:
            if error.exit_code not in _RESUMABLE:
                discard(work)
            raise
        discard(work)


def recorded_source(folder: Path) -> dict[str, Any]:
    """Returns the source that a chunk directory, or unfinished work on it, records; {}: neither."""
    work = hidden(folder, "unfinished")
    identity = read_manifest(folder) if folder.exists() else _read_plan(work)
    source: dict[str, Any] = identity.get("source", {})
    return source


def _refuse_foreign(folder: Path) -> None:
    """Raises a UserError if something else than a chunk directory has this name."""
    is_ours = all((folder / name).is_file() for name in (DATASET_DICT_FILE, MANIFEST_FILE))
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if os.path.lexists(folder) and not is_ours and not is_empty:
        raise already_exists(
            str(folder),
            "something else than a chunk directory has this name",
            "Choose another --name or --output-dir, or remove it if it is a damaged one.",
        )


def _refuse_other(folder: Path, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises a UserError if `folder` is made of other text or with other options."""
    different = [
        f"{option_flag(name)} was {recorded['options'].get(name)!r}"
        for name, value in identity["options"].items()
        if recorded["options"].get(name) != value
    ]
    if recorded["source"] != identity["source"]:
        different.append("--source was other text, or --licence another one")
    if different:
        raise already_exists(
            str(folder),
            f"this was made differently: {'; '.join(different)}",
            "Choose another --name, or replace it with --overwrite.",
        )


def _read_plan(work: Path) -> dict[str, Any]:
    """Returns the identity of unfinished work; {} if it cannot be resumed."""
    file = work / _PLAN_FILE
    fix = "Begin again with --overwrite."
    kind = dict[str, Any]
    plan = read_json(file, kind, fix=fix, exit_code=ExitCode.DAMAGED) if file.exists() else {}
    return plan if {"unit_version", "options", "source"} <= plan.keys() else {}
