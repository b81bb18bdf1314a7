"""Preprocessing from end to end: documents in, a chunk directory out.

resolve the source -> plan units -> finish every unit in a worker process (read, clean, encode)
-> decide about every document -> pack into chunks and write shards -> write the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import kiem
from kiem.config import MIN_CHUNK_SIZE, PreprocessOptions
from kiem.core.errors import ExitCode, UserError, bad_option, no_effect
from kiem.core.files import new_folder, read_sealed, require_free_space, sealed_file
from kiem.core.values import check_name, given_options, option_flag
from kiem.data.chunks import finish_directory
from kiem.data.clean.cleaner import Cleaning, make_cleaning
from kiem.data.clean.languages import find_language
from kiem.data.licences import with_licences
from kiem.data.prepare.decisions import DocumentDecisions, decide
from kiem.data.prepare.downloads import (
    download_bytes,
    fetch,
    find_finished,
    group_files,
    place_files,
    plan_group,
)
from kiem.data.prepare.second_reading import TrainingTexts, cut_documents, write_rejected
from kiem.data.prepare.summary import describe_left_out, print_summary
from kiem.data.prepare.units import Job, Unit, digest, open_unit, read_rows
from kiem.data.prepare.verify import verify_directory
from kiem.data.prepare.work_directory import recorded_source, work_directory
from kiem.data.prepare.workers.run import run_units
from kiem.data.prepare.write_splits import (
    UnitDocuments,
    check_weights,
    describe_parts,
    find_borders,
    write_splits,
)
from kiem.data.read.hub_dataset import HUB_PREFIX
from kiem.data.read.readers import check_effects
from kiem.data.read.source_file import STANDARD_INPUT
from kiem.data.read.sources import (
    DEFAULT_HUB_SIZE,
    Source,
    check_hub_size,
    resolve_source,
    source_name,
    word_limit,
)
from kiem.hub.dataset import is_offline
from kiem.tokenizer.tokenizer import Tokenizer, load_tokenizer, parse_tokenizer, write_tokenizer
from kiem.tokenizer.train import train_tokenizer, vocabulary_size_to_train

# Unit files and chunks exist at the same time. A token takes four bytes and has at least three of
# text. Rejected documents that are kept take less.
_OUTPUT_BYTES_PER_TEXT_BYTE = 3
_VOCABULARY_FILE = "vocabulary.sealed"
# The options that make the result, besides those of cleaning and the tokenizer.
_RECORDED_OPTIONS = (
    *("dataset_size", "chunk_size", "test_split", "seed", "text_column", "document_separator"),
    *("packing", "on_bad_document", "keep_rejected"),
)


def preprocess(options: PreprocessOptions, console: Console) -> Path:
    """Makes a chunk directory of the text that the options name.

    Args:
        options: all options of preprocess.py.
        console: where progress and the closing table go.

    Returns:
        The chunk directory. If it exists already, made of the same text with the same options, it
        is verified and left as it is. If an earlier run was interrupted, this one resumes it.

    Raises:
        UserError: anything about the options, the text, the Hub or the disk that a user can fix.
    """
    started = time.perf_counter()
    if options.verify is not None:
        for name in given_options(options):
            if name != "verify":
                raise no_effect(option_flag(name), "together with --verify")
        verify_directory(options.verify)
        console.print(f"{options.verify}: every hash and count is right")
        return options.verify
    _check_options(options)
    cleaning = make_cleaning(options, console)
    source, tokenizer = _resolve(options, console)
    identity = _identity(options, source, tokenizer, cleaning)
    folder = options.output_dir / directory_name(options)
    with work_directory(folder, identity, options.overwrite) as work:
        if work is None:
            console.print(f"{folder} is there already, made of the same text; verified.")
            return folder
        source = place_files(source, work, options.hub_cache_bytes)
        job = Job(options, source, (), cleaning, work, digest(identity), tokenizer)
        # Train a vocabulary if one is wanted.
        if tokenizer is None:
            job = replace(job, tokenizer=_trained_tokenizer(job, console))
        # Plan, and read, clean and encode in the workers.
        job = _finish_units(job, console)
        # Decide about every document, pack, and write the chunk directory.
        decisions = decide(job)
        with new_folder(folder, overwrite=options.overwrite, temporary=work / "result") as result:
            manifest = {
                **identity,
                "not_read": dict(sorted(source.not_read.items())),
                **_write_chunks(job, decisions, result),
            }
            finish_directory(result, manifest)
    print_summary(manifest, time.perf_counter() - started, folder, console)
    return folder


def _check_options(options: PreprocessOptions) -> None:
    """Raises a UserError if an option has no effect or no meaning."""
    if options.source == ("hub",):
        check_hub_size(options.dataset_size or DEFAULT_HUB_SIZE)
    else:
        word_limit(options.dataset_size)
    is_cleaned = find_language(options.clean) or options.near_duplicates or options.decontaminate
    if options.ray_address is not None and options.executor != "ray":
        raise no_effect("--ray-address", "without --executor ray")
    if options.executor == "ray" and STANDARD_INPUT in options.source:
        what = "other machines cannot read this one's standard input"
        raise bad_option("--source -", what, "Give a file, or leave --executor ray out.")
    check_weights(options)
    if options.keep_rejected and not is_cleaned and options.on_bad_document == "stop":
        ways = "--clean, --near-duplicates, --decontaminate or --on-bad-document skip"
        raise no_effect("--keep-rejected", f"without {ways}: nothing is rejected")
    if options.hub_cache_bytes is not None and not _is_on_hub(options):
        raise no_effect("--hub-cache-bytes", "without a source hub:OWNER/NAME")
    if options.hub_cache_bytes is not None and is_offline():
        raise no_effect("--hub-cache-bytes", "with HF_HUB_OFFLINE=1, when nothing is downloaded")
    vocabulary_size_to_train(options.tokenizer)


def _is_on_hub(options: PreprocessOptions) -> bool:
    return any(name.startswith(HUB_PREFIX) for name in options.source)


def _resolve(options: PreprocessOptions, console: Console) -> tuple[Source, Tokenizer | None]:
    """Finds the text and loads the tokenizer; None if one is to be trained."""
    is_default, is_on_hub = options.source == ("hub",), _is_on_hub(options)
    recorded: dict[str, Any] = {}
    if (is_default or is_on_hub) and not options.overwrite:
        # Resuming needs the same text, although the dataset may have changed since.
        recorded = recorded_source(options.output_dir / directory_name(options))
    resolve = partial(
        resolve_source,
        options.source,
        options.dataset_size,
        recorded=recorded,
        console=console,
        document_separator=options.document_separator,
        is_apart=bool(options.weights),
    )
    # The tokenizer before the Hub's gigabytes of text, which are useless without it.
    source = None if is_default else resolve()
    if source is not None:
        check_effects(source, options.text_column)
    is_trained = vocabulary_size_to_train(options.tokenizer) is not None
    tokenizer = None if is_trained else load_tokenizer(options.tokenizer)
    return source or resolve(), tokenizer


def directory_name(options: PreprocessOptions) -> str:
    """Returns the name of the chunk directory: --name, or chunked_ and the size or source."""
    if options.name is not None:
        return check_name(options.name, "--name")
    if options.source == ("hub",):
        return f"chunked_{options.dataset_size or DEFAULT_HUB_SIZE}"
    size = f"_{options.dataset_size}" if options.dataset_size else ""
    return f"chunked_{source_name(options.source)}{size}"


def _identity(
    options: PreprocessOptions, source: Source, tokenizer: Tokenizer | None, cleaning: Cleaning
) -> dict[str, Any]:
    """Returns what a chunk directory is made of, as the manifest records it."""
    return {
        "options": {
            **{name: getattr(options, name) for name in _RECORDED_OPTIONS},
            "weights": [*options.weights] or None,
            **cleaning.identity,
            "tokenizer": tokenizer.sha256 if tokenizer else options.tokenizer,
        },
        "source": with_licences(source.description, options.source, options.licence),
    }


def _trained_tokenizer(job: Job, console: Console) -> Tokenizer:
    """Trains a vocabulary on the training documents, or takes the one of an interrupted run.

    To know which documents these are, all units are first finished without ids.
    """
    vocabulary_size = vocabulary_size_to_train(job.options.tokenizer)
    assert vocabulary_size is not None
    file = job.folder / _VOCABULARY_FILE
    if (json_bytes := read_sealed(file)) is not None:
        return parse_tokenizer(json_bytes, job.options.tokenizer)
    job = _finish_units(job, console)
    decisions = decide(job)
    with console.status(f"Training a vocabulary of {vocabulary_size} entries"):
        texts, missing = TrainingTexts(job, decisions), describe_left_out(decisions.counts)
        tokenizer = train_tokenizer(texts, vocabulary_size, missing)
    with sealed_file(file) as opened:
        opened.write(tokenizer.json_bytes)
    return tokenizer


def _finish_units(job: Job, console: Console) -> Job:
    """Plans and finishes the units, or as many as the word limit needs; returns the job with them.

    What is on the Hub is downloaded group by group, as far as it is needed.
    """
    limit, groups = job.word_limit, group_files(job)
    units: list[Unit] = []
    num_words = 0
    for number, files in enumerate(groups):
        words, needed = find_finished(job, files, len(units))
        job = fetch(job, needed, console)
        group = plan_group(job, files, len(units))
        if left := [unit for unit in group if unit.number not in words]:
            following = [] if limit else [n for later in groups[number + 1 :] for n in later]
            _require_room(job, left, download_bytes(job, following))
            words = _run_group(replace(job, units=left), words, num_words, console)
        units += group
        num_words += sum(words.values())
        if limit is not None and num_words > limit:
            break
    return replace(job, units=units)


def _require_room(job: Job, units: list[Unit], later_bytes: int) -> None:
    """Raises a UserError if the disk has no room for units, and what is downloaded after them."""
    num_bytes = sum(unit.num_bytes for unit in units)
    finished_bytes = sum(path.stat().st_size for path in map(job.path, units) if path.exists())
    needed_bytes = _OUTPUT_BYTES_PER_TEXT_BYTE * (num_bytes + later_bytes)
    needed_bytes += len(job.tokenizer.json_bytes) if job.tokenizer else 0
    require_free_space(job.folder, needed_bytes - finished_bytes, "the chunk directory")


def _run_group(
    job: Job, finished: dict[int, int], num_words: int, console: Console
) -> dict[int, int]:
    """Finishes the units of a job, or as many as the word limit needs.

    Args:
        job: with the units of a group of files that are not finished.
        finished: the words of the others by their numbers.
        num_words: the words of all units before the group.
        console: for progress.

    Returns:
        The words of all finished units of the group.
    """
    # Follow the workers until the units before the first unfinished one reach the word limit.
    limit, words = job.word_limit, dict(finished)
    next_unit = min([job.units[0].number, *words])
    with (
        closing(run_units(job, console)) as running,
        Progress(console=console, transient=True) as progress,
    ):
        total = sum(unit.num_bytes for unit in job.units)
        bar = progress.add_task("encoding" if job.tokenizer else "reading", total=total)
        for unit, summary in running:
            progress.update(bar, advance=unit.num_bytes)
            words[unit.number] = summary.words
            while next_unit in words:
                num_words += words[next_unit]
                next_unit += 1
            if limit is not None and num_words > limit:
                break
    return words


def _write_chunks(job: Job, decisions: DocumentDecisions, result: Path) -> dict[str, Any]:
    """Writes the chunk directory but for its manifest; returns the manifest's entries about it."""
    options, tokenizer = job.options, job.tokenizer
    assert tokenizer is not None
    # Cut documents where they are few and large.
    counts: dict[str, Any] = decisions.counts.copy()
    cut: list[UnitDocuments] = []
    if decisions.num_cut:
        documents, counts["cut_for_test"] = cut_documents(job, decisions)
        cut.append(documents)

    # Pack, and account for every document.
    def all_documents() -> Iterator[UnitDocuments]:
        for unit, codes, rows_before in decisions.by_unit():
            batches, summary = open_unit(unit, job)
            rows = read_rows(unit, batches, rows_before)
            yield UnitDocuments(batches, list(summary.sources), codes, rows)
        yield from cut

    file_names = [file.name for file in job.source.files]
    borders = find_borders(job, decisions)
    with ExitStack() as open_files:
        splits, num_unused_rows, num_chunks = write_splits(
            all_documents(), tokenizer, options, result, open_files, file_names, borders
        )
    if options.weights:
        splits["train"]["parts"] = describe_parts(options, borders, num_chunks, len(file_names))
    num_kept = sum(split["documents"] for split in splits.values()) - decisions.num_cut
    num_left_out = sum(counts["rejected"].values()) + counts["documents_beyond_limit"]
    assert num_kept + num_left_out == counts["documents_read"], "documents were lost"
    train, test = (splits[name]["tokens"] for name in ("train", "test"))
    if train < options.chunk_size:
        smaller = f", or --chunk-size {train} or less" if train >= MIN_CHUNK_SIZE else ""
        raise UserError(
            f"{train} tokens for training, besides {test} for testing, are less than one chunk of "
            f"{options.chunk_size}{describe_left_out(counts)}",
            where="--source",
            fix=f"Use more text{smaller}.",
            exit_code=ExitCode.DATASET_TOO_SMALL,
        )
    # Put the other files beside the chunks.
    write_tokenizer(tokenizer, result)
    if options.keep_rejected:
        counts["rejected_file"] = write_rejected(job, decisions, result)
    return {
        "kiem_version": kiem.__version__,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "origin": tokenizer.origin,
            "num_rows": tokenizer.num_rows,
            "num_unused_rows": num_unused_rows,
        },
        "special_ids": tokenizer.special_ids,
        **counts,
        "splits": splits,
    }
