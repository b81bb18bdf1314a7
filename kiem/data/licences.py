"""Licences of the text, as --licence states them, in the manifest's entry `source`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kiem.core.errors import bad_option
from kiem.data.read.find_files import find_files
from kiem.data.source_record import list_sources


def with_licences(
    description: dict[str, Any], patterns: Sequence[str], licences: Sequence[str]
) -> dict[str, Any]:
    """Returns the manifest's entry `source` with the licences that the options state.

    Args:
        description: the entry without them.
        patterns: the values of --source.
        licences: one for all of them, or one for each; an empty one states nothing.

    Raises:
        UserError: there are more or fewer licences than sources.
    """
    if len(licences) not in (0, 1, len(patterns)):
        what = f"{len(licences)} licences for {len(patterns)} sources"
        raise bad_option("--licence", what, "Give one for all, or one for each --source.")
    if not any(licences):
        return description
    of_patterns = list(licences) * (len(patterns) if len(licences) == 1 else 1)
    left = list_sources(description).copy()
    entries: list[dict[str, Any]] = []
    for pattern, licence in zip(patterns, of_patterns, strict=True):
        entry = left.pop(0)
        stated = {"licence": licence} if licence else {}
        if entry["kind"] == "files":
            # An entry holds the files of several patterns.
            count = len(find_files([pattern], "--source")[0])
            files = list(entry["sha256"].items())
            if files[count:]:
                left.insert(0, {**entry, "sha256": dict(files[count:])})
            entry = {**entry, "sha256": dict(files[:count])}
            last = entries[-1] if entries else {}
            if last.get("kind") == "files" and last.get("licence") == stated.get("licence"):
                last["sha256"] |= entry["sha256"]
                continue
        entries.append({**entry, **stated})
    return entries[0] if len(entries) == 1 else {"kind": "several", "sources": entries}
