"""Licences of the text, as --licence states them, in the manifest's entry `source`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    stated = iter(zip(patterns, of_patterns, strict=True))
    entries: list[dict[str, Any]] = []
    for entry in list_sources(description):
        if entry["kind"] == "files":
            entries += _cut_entry(entry, stated)
        else:
            _, licence = next(stated)
            entries.append(_with_licence(entry, licence))
    return entries[0] if len(entries) == 1 else {"kind": "several", "sources": entries}


def _cut_entry(
    entry: dict[str, Any], stated: Iterator[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Yields the entry of files of one or several patterns, cut where another licence begins."""
    files = list(entry["sha256"].items())
    part: dict[str, Any] = {}
    while files:
        pattern, licence = next(stated)
        num_files = len(find_files([pattern], "--source")[0])
        following = _with_licence({**entry, "sha256": dict(files[:num_files])}, licence)
        files = files[num_files:]
        if part and part.get("licence") == following.get("licence"):
            part["sha256"] |= following["sha256"]
            continue
        if part:
            yield part
        part = following
    yield part


def _with_licence(entry: dict[str, Any], licence: str) -> dict[str, Any]:
    return {**entry, "licence": licence} if licence else entry
