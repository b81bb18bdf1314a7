"""Options of kiem audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kiem.config.limits import Count


@dataclass(frozen=True)
class AuditOptions:
    """Prove what a run was made from, by hashes; or list the documents that an update read."""

    run: Path
    """Run directory, such as trained_models/gemma3-1b-dutch-latest; `kiem audit RUN` is short for
    it."""
    step: Count | None = None
    """List the documents that this update read, by source, file and row."""
    dataset_path: tuple[Path, ...] = ()
    """Where the run's chunk directories are now, in the order of its options. Default: where they
    were."""
