"""What a run directory says about where the run came from."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError, bad_option, damaged, not_found
from kiem.core.json_input import read_json
from kiem.core.yaml_options import read_options
from kiem.report.record import CONFIG_FILE, METADATA_FILE, SUMMARY_FILE

FINAL_MODEL = "final_model"
CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
FIX = "Restore the file, or audit another run."
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
_CountOrZero = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_FileName = Annotated[str, msgspec.Meta(pattern=r"^[^./\\][^/\\]*$")]  # in the same folder


class _Directory(msgspec.Struct):
    name: str
    manifest_sha256: str


class _Data(msgspec.Struct):
    directories: tuple[_Directory, ...] = ()
    anneal: tuple[_Directory, ...] = ()
    manifest_sha256: str | None = None  # of earlier versions, which read one directory


class _Recipe(msgspec.Struct):
    chunks_per_step: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    max_steps: _Positive | None = None
    batch_warmup_steps: _CountOrZero = 0


class _Branch(msgspec.Struct):
    run: _FileName
    step: _Positive
    checkpoint_sha256: str


class _FirstWeights(msgspec.Struct):
    sha256: dict[_FileName, str]
    commit: _FileName | None = None


class Metadata(msgspec.Struct):
    """run.json, or training_summary.json, which says more at the end."""

    initialized_from: str
    data: _Data
    recipe: _Recipe
    steps: _Positive | None = None
    branched_from: _Branch | None = None
    first_weights: _FirstWeights | None = None

    @property
    def manifests(self) -> list[str]:
        """The SHA-256 of the manifest of each chunk directory, in the order of the options."""
        if self.data.manifest_sha256 is not None:
            return [self.data.manifest_sha256]
        return [entry.manifest_sha256 for entry in (*self.data.directories, *self.data.anneal)]


class _Fingerprint(msgspec.Struct):
    data: str | tuple[str, ...]
    seed: int
    chunks_per_step: int
    batch_warmup_steps: int = 0
    anneal: tuple[str, ...] | None = None


class State(msgspec.Struct):
    """state.json of a checkpoint."""

    fingerprint: _Fingerprint

    @property
    def manifests(self) -> list[str]:
        """As those of `Metadata`."""
        data = self.fingerprint.data
        return [*([data] if isinstance(data, str) else data), *(self.fingerprint.anneal or ())]


@dataclass(frozen=True)
class RunRecord:
    """A run directory.

    Attributes:
        directory: where it is.
        options: of training.py, with the paths of the chunk directories as they are now.
        earlier_paths: where these were when the run read them.
        metadata: of run.json.
        summary: of final_model/training_summary.json; None: the run has no final model, or that
            file is damaged.
    """

    directory: Path
    options: TrainingOptions
    earlier_paths: list[Path]
    metadata: Metadata
    summary: Metadata | None

    @property
    def chunk_directories(self) -> list[Path]:
        """The paths of the chunk directories, in the order of their chunks' numbers."""
        return [*self.options.dataset_path, *self.options.anneal]

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that are kept, oldest first."""
        found = [path for path in (self.directory / CHECKPOINTS).glob("step-*") if path.is_dir()]
        steps = {path: path.name.removeprefix("step-") for path in found}
        return sorted((p for p in found if steps[p].isdecimal()), key=lambda p: int(steps[p]))


def read_run(directory: Path, dataset_path: tuple[Path, ...]) -> RunRecord:
    """Reads what a run directory says about its origin.

    Args:
        directory: the run directory.
        dataset_path: where its chunk directories are now; empty: where they were.

    Raises:
        UserError: it is no run directory, a file in it is damaged, or there are more or fewer
            chunk directories than that.
    """
    config = directory / CONFIG_FILE
    if not config.is_file():
        fix = "Name a folder that training.py made, such as trained_models/gemma3-1b-dutch-..."
        raise not_found(str(directory), f"not a run directory: no {CONFIG_FILE}", fix)
    try:
        options = TrainingOptions(**read_options(TrainingOptions, config))
    except TypeError as error:  # the path of the chunks is not there
        what = "does not say which chunks the run read"
        raise UserError(what, where=str(config), fix=FIX, exit_code=ExitCode.DAMAGED) from error
    metadata = read_json(directory / METADATA_FILE, Metadata, fix=FIX, exit_code=ExitCode.DAMAGED)
    summary = None
    with contextlib.suppress(UserError):  # the manifest beside it says so as well
        file = directory / FINAL_MODEL / SUMMARY_FILE
        summary = read_json(file, Metadata, fix=FIX, exit_code=ExitCode.DAMAGED)
    earlier_paths = [*options.dataset_path, *options.anneal]
    num_main, num_all = len(options.dataset_path), len(metadata.manifests)
    if len(earlier_paths) != num_all:
        what = f"names {len(earlier_paths)} chunk directories, {METADATA_FILE} {num_all}"
        raise damaged(str(config), what, FIX)
    if dataset_path:
        if len(dataset_path) != num_all:
            what = f"{len(dataset_path)} chunk directories, but the run read {num_all}"
            raise bad_option("--dataset-path", what, f"Give {num_all}, as in {config}.")
        options = replace(
            options, dataset_path=dataset_path[:num_main], anneal=dataset_path[num_main:]
        )
    return RunRecord(directory, options, earlier_paths, metadata, summary)
