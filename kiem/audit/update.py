"""The documents that an update read: a function of the chunk directories, the seed and the step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from kiem.audit.record import RunRecord
from kiem.core.console import show, warn
from kiem.core.errors import UserError, bad_option, damaged
from kiem.core.manifest import MANIFEST_FILE
from kiem.data.documents import Piece, open_verified_documents
from kiem.data.mixture import Directory, read_directory, read_mixture
from kiem.data.order import chunk_numbers
from kiem.report.record import METRICS_FILE, Line, read_metrics


class ReadPiece(NamedTuple):
    """A piece of a document that an update read.

    Attributes:
        directory: the chunk directory that it is in.
        source, file: names of its source and file.
        is_cut: whether the document's end or beginning is in the other split.
        piece: where in the chunk and in the document.
    """

    directory: Path
    source: str
    file: str
    is_cut: bool
    piece: Piece


def read_pieces(run: RunRecord, step: int) -> Iterator[ReadPiece]:
    """Yields what an update read, in the order in which it was read.

    Args:
        run: the run.
        step: the update, from 1 as in the log.

    Raises:
        UserError: a chunk directory is missing, changed, or made by a version that did not record
            the documents.
    """
    recipe = run.metadata.recipe
    mixture = read_mixture(run.options)
    directories = (*mixture.directories, *mixture.anneal)
    recorded = zip(directories, run.earlier_paths, run.metadata.manifests, strict=True)
    for directory, earlier_path, expected in recorded:
        if not (directory.sha256 == expected or _was_made_again(directory, earlier_path, expected)):
            what = f"is changed: the run read one of sha256 {expected}, this is {directory.sha256}"
            fix = "Name the one that it read with --dataset-path."
            raise damaged(str(directory.path / MANIFEST_FILE), what, fix)
    documents = [open_verified_documents(d.path, d.manifest, "train") for d in directories]
    sizes = np.array([directory.num_chunks for directory in directories])
    order = mixture.order(
        run.options, recipe.chunks_per_step, recipe.max_steps, recipe.batch_warmup_steps
    )
    for number in chunk_numbers(order, step - 1).tolist():
        place = int(np.searchsorted(np.cumsum(sizes), number, side="right"))
        directory = directories[place]
        files = list(directory.manifest["documents_per_file"])
        cut = directory.manifest.get("cut_for_test", {}).get("places", ())
        sources = directory.manifest["splits"]["train"]["source_names"]
        for piece in documents[place].in_chunk(number - int(sizes[:place].sum())):
            file = files[piece.file]
            is_cut = f"{file}:{piece.row}" in cut
            yield ReadPiece(directory.path, sources[piece.source], file, is_cut, piece)


def print_update(run: RunRecord, step: int, console: Console) -> None:
    """Prints the documents that an update read; raises as `read_pieces`."""
    lines, _ = read_metrics(run.directory / METRICS_FILE, Line)
    last = max((line.step for line in lines), default=0)
    branch = run.metadata.branched_from
    if branch is not None and step <= branch.step:
        what = f"update {step} was made by {branch.run}, from which this run branches"
        raise bad_option("--step", what, f"Audit {branch.run} for it.")
    if step > last:
        raise bad_option("--step", f"{step} is not possible", f"The run has {last} updates so far.")
    for line in lines:
        if line.warning.startswith((f"step {step} is skipped", f"step {step}:")):
            warn(console, f"{line.warning}: its gradients were not used")
    if run.options.anneal:
        warn(
            console,
            "where --anneal begins follows from the run's last --max-steps and --anneal-share; if "
            "they were changed on the way, updates before that may have read other chunks",
        )
    names = [path.name for path in run.chunk_directories]
    rows = []
    for read in read_pieces(run, step):
        piece = read.piece
        rows.append(
            f"{read.source}\t{read.file}:{piece.row}\t"
            f"tokens {piece.start} to {piece.start + piece.length - 1}"
            f"{' of the part for training' if read.is_cut else ''}\t"
            f"chunk {piece.chunk}{f' of {read.directory.name}' if len(names) > 1 else ''}"
        )
    show(console, "".join(f"{row}\n" for row in rows))


def _was_made_again(directory: Directory, earlier_path: Path, expected: str) -> bool:
    """Returns whether a directory has the chunks of the one that a run read, which is still there.

    So the documents of one that earlier versions made can be listed, too.
    """
    with contextlib.suppress(UserError):
        earlier = read_directory(earlier_path)
        hashes, earlier_hashes = (
            [shard["sha256"] for shard in each.manifest["splits"]["train"]["shards"]]
            for each in (directory, earlier)
        )
        return earlier.sha256 == expected and hashes == earlier_hashes
    return False
