"""Files of sources on the Hub: downloaded in groups while the work goes on.

They go into the Hub's cache and stay there. With --hub-cache-bytes they go into the work directory,
and are removed when others need their room. The plan of units depends on neither, since a unit
never has parts of two files that are downloaded. The parts are kept, so that finished units are
known without the files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path

import msgspec
from rich.console import Console

from kiem.core.errors import UserError, bad_option
from kiem.core.files import read_sealed, remove_file, sealed_file
from kiem.core.processors import num_processors
from kiem.data.prepare.units import Job, Unit, list_file_parts, open_unit, plan_units
from kiem.data.read.formats import look_inside
from kiem.data.read.readers import FilePart
from kiem.data.read.source_file import SourceFile, file_stamp
from kiem.data.read.sources import Source
from kiem.hub.dataset import download_files, local_path, verify_download

# With a word limit, most of a large dataset is not needed.
_GROUP_BYTES_WITH_LIMIT = 1_000_000_000


def place_files(source: Source, work: Path, hub_cache_bytes: int | None) -> Source:
    """Returns a source with the places that its files on the Hub will have.

    Raises:
        UserError: one of them is larger than all may be together.
    """
    if hub_cache_bytes is None:
        return source
    remote = [file.remote for file in source.files if file.remote]
    largest = max(remote, key=lambda file: file.num_bytes)
    if largest.num_bytes > hub_cache_bytes:
        total = sum(file.num_bytes for file in remote)
        what = f"{largest.name} of {largest.repo} alone has {largest.num_bytes} bytes"
        fix = f"Give at least {largest.num_bytes}; all {len(remote):,} files have {total}."
        raise bad_option(f"--hub-cache-bytes {hub_cache_bytes}", what, fix)
    folder = _folder(work)
    files = [
        file._replace(path=local_path(file.remote, folder)) if file.remote else file
        for file in source.files
    ]
    return replace(source, files=files)


def group_files(job: Job) -> list[range]:
    """Returns the numbers of the files in groups that are downloaded and read one after another."""
    most = job.options.hub_cache_bytes
    most = most or (_GROUP_BYTES_WITH_LIMIT if job.word_limit else sys.maxsize)
    starts, group_bytes = [0], 0
    for number in range(len(job.source.files)):
        num_bytes = download_bytes(job, [number])
        if number > starts[-1] and num_bytes and group_bytes + num_bytes > most:
            starts.append(number)
            group_bytes = 0
        group_bytes += num_bytes
    return [range(*ends) for ends in pairwise([*starts, len(job.source.files)])]


def download_bytes(job: Job, numbers: Iterable[int]) -> int:
    """Returns the size of files, of those that are downloaded."""
    remote = (job.source.files[number].remote for number in numbers)
    return sum(file.num_bytes for file in remote if file)


def fetch(job: Job, numbers: Sequence[int], console: Console | None = None) -> Job:
    """Downloads files of the source that are missing; returns the job with what is in them.

    Raises:
        UserError: no access, no network, or no room on the disk.
    """
    files = list(job.source.files)
    wanted = {number: file.remote for number in numbers if (file := files[number]).remote}
    if not wanted:
        return job
    folder = None
    if job.options.hub_cache_bytes is not None:
        folder = _folder(job.folder)
        _make_room(folder, [files[number] for number in wanted], job.options.hub_cache_bytes)
    download_files([remote for remote in wanted.values() if remote], folder, console)
    with ThreadPoolExecutor(num_processors()) as pool:
        there = pool.map(_verified, (files[number] for number in wanted))
        files_there = dict(zip(wanted, there, strict=True))
    files = [files_there.get(number, file) for number, file in enumerate(files)]
    return replace(job, source=replace(job.source, files=files))


def _verified(file: SourceFile) -> SourceFile:
    """Returns a downloaded file with its stamp and true kind; raises a UserError if it differs."""
    stamp = file_stamp(file.path)
    if file.remote is None or file.stamp == stamp:  # verified before, and not changed since
        return file
    verify_download(file.remote, file.path)
    return look_inside(file._replace(stamp=stamp))


def plan_group(job: Job, numbers: Sequence[int], first: int) -> list[Unit]:
    """Returns the units of a group of files, numbered from `first`.

    Files whose parts are not known from before must be there.
    """
    parts: list[FilePart] = []
    for number in numbers:
        if (known := _known_parts(job, number)) is None:
            known = list_file_parts(job.source, number)
            with sealed_file(_parts_file(job, number)) as file:
                file.write(msgspec.json.encode(known))
        parts += known
    return plan_units(job.source, parts, first)


def find_finished(job: Job, numbers: Sequence[int], first: int) -> tuple[dict[int, int], list[int]]:
    """Finds out what of a group of files is finished, so that its files need not be downloaded.

    Returns:
        The words of finished units by their numbers, and the numbers of the other files.
    """
    if not download_bytes(job, numbers):
        return {}, [*numbers]
    known = [*takewhile(lambda parts: parts is not None, (_known_parts(job, n) for n in numbers))]
    units = plan_units(job.source, [part for parts in known for part in parts or ()], first)
    words = {}
    needed = {*numbers[len(known) :]}
    for unit in units:
        try:
            words[unit.number] = open_unit(unit, job)[1].words
        except UserError:
            needed |= {part.file for part in unit.parts}
    return words, sorted(needed)


def _known_parts(job: Job, number: int) -> list[FilePart] | None:
    """Returns the parts of a file, None if it is one to download and they are not known yet."""
    if job.source.files[number].remote is None:
        return list_file_parts(job.source, number)
    content = read_sealed(_parts_file(job, number))
    return None if content is None else msgspec.json.decode(content, type=list[FilePart])


def _parts_file(job: Job, number: int) -> Path:
    return job.folder / f"{number:06d}.parts"


def _folder(work: Path) -> Path:
    return work / "hub"


def _make_room(folder: Path, wanted: Sequence[SourceFile], most_bytes: int) -> None:
    """Removes the files of a folder, except wanted ones, if the wanted would be too much beside."""
    paths = {file.path: file.remote.num_bytes for file in wanted if file.remote}
    others = [path for path in folder.rglob("*") if path.is_file() and path not in paths]
    # Listings and the like, which huggingface_hub uses again, are small.
    others = [path for path in others if ".cache" not in path.parts or path.suffix == ".incomplete"]
    there_bytes = sum(path.stat().st_size for path in others)
    if there_bytes + sum(paths.values()) > most_bytes:
        for path in others:
            remove_file(path)
