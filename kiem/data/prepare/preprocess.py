"""Preprocessing from end to end: documents in, a chunk directory out.

resolve the source -> plan of units -> finish every unit (in worker processes, each unit one file)
-> decide what is kept and where it goes -> pack and write the chunk directory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import kiem
from kiem.config import MIN_CHUNK_SIZE, PreprocessOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import new_folder, read_sealed, require_free_space, sealed_file
from kiem.core.leftovers import recover_folder
from kiem.core.values import check_name
from kiem.data.chunks import finish_directory
from kiem.data.clean.cleaner import Cleaning, make_cleaning
from kiem.data.clean.contamination import MIN_EVALUATION_WORDS
from kiem.data.prepare.assemble import write_splits
from kiem.data.prepare.cut import cut_documents
from kiem.data.prepare.fates import decide
from kiem.data.prepare.options import check_options, check_verify_alone
from kiem.data.prepare.ray_workers import run_units_on_ray
from kiem.data.prepare.rejected import write_rejected
from kiem.data.prepare.summary import UnitProgress, left_out, print_summary
from kiem.data.prepare.training_texts import TrainingTexts
from kiem.data.prepare.units import Reading, Unit, UnitJob, plan_units
from kiem.data.prepare.verify import verify_directory
from kiem.data.prepare.workers import run_units
from kiem.data.prepare.workspace import (
    clear_after_kill,
    earlier_identity,
    identity_digest,
    refuse_foreign,
    refuse_other,
    working_folder,
)
from kiem.data.read.readers import check_effects
from kiem.data.read.sources import (
    DEFAULT_HUB_SIZE,
    Source,
    resolve_source,
    word_limit,
)
from kiem.tokenizer.encoding import Encoder, fast_path, load_encoders
from kiem.tokenizer.tokenizer import (
    Tokenizer,
    load_tokenizer,
    parse_tokenizer,
    train_tokenizer,
    vocabulary_size_to_train,
    write_tokenizer,
)

# Units and chunks are there at the same time; four bytes a token and at least three of text in it.
# A rejected document that is kept is in no chunk, so it takes less.
_OUTPUT_BYTES_PER_TEXT_BYTE = 3
_VOCABULARY_FILE = "vocabulary.sealed"


def preprocess(options: PreprocessOptions, console: Console) -> Path:
    """Makes a chunk directory of the text that the options name.

    Args:
        options: all options of preprocess.py.
        console: where progress and the closing table go.

    Returns:
        The chunk directory. If it exists already, made of the same text with the same options, it
        is verified and left as it is. If an earlier run was interrupted, this one goes on with what
        that one finished.

    Raises:
        UserError: anything about the options, the text, the Hub or the disk that a person can mend.
    """
    started = time.perf_counter()
    if options.verify is not None:
        check_verify_alone(options)
        verify_directory(options.verify)
        console.print(f"{options.verify}: every hash and count is right")
        return options.verify
    check_options(options)
    vocabulary_size = vocabulary_size_to_train(options.tokenizer)
    # Local files first, since that is quick; but the tokenizer before the Hub's gigabytes of text,
    # which are useless without it.
    is_local = options.source != ("hub",)
    resolve = partial(
        resolve_source,
        options.source,
        options.dataset_size,
        console=console,
        document_separator=options.document_separator,
    )
    source = resolve() if is_local else None
    if source is not None:
        check_effects(source, options.text_column)
    tokenizer = None if vocabulary_size else load_tokenizer(options.tokenizer)
    if source is None:  # go on with the same text, although the dataset may have changed
        revision = None if options.overwrite else _pinned_revision(options)
        source = resolve(revision=revision)
    folder = options.output_dir / directory_name(options, source.name)
    cleaning = make_cleaning(options, console)
    if cleaning.evaluation is not None and (num_ignored := cleaning.evaluation.num_ignored):
        texts = "1 evaluation text has" if num_ignored == 1 else f"{num_ignored} texts have"
        warn(
            console,
            f"--decontaminate: {texts} fewer than {MIN_EVALUATION_WORDS} words, not looked for",
        )
    identity = _identity(options, source, tokenizer, cleaning)
    refuse_foreign(recover_folder(folder))
    if _is_made(folder, identity, options, console):
        clear_after_kill(folder)
        return folder
    reading = Reading(source, options.text_column, options.on_bad_document)
    units = plan_units(source)
    with working_folder(folder, identity, options.overwrite) as work:
        if _is_made(folder, identity, options, console):  # by the process that had the lock
            return folder
        if tokenizer is None:
            tokenizer = _trained_tokenizer(reading, cleaning, units, options, work, console)
        job = UnitJob(
            folder=work,
            identity=identity_digest(identity, tokenizer.sha256),
            reading=reading,
            seed=options.seed,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            cleaning=cleaning,
        )
        seconds = _finish_units(units, job, tokenizer, options, console)
        packing_started = time.perf_counter()
        with new_folder(folder, overwrite=options.overwrite, temporary=work / "result") as result:
            not_read = {"not_read": dict(sorted(source.not_read.items()))}
            manifest = {**identity, **not_read, **_assemble(units, job, tokenizer, options, result)}
            finish_directory(result, manifest)
        seconds["packing"] = time.perf_counter() - packing_started
    print_summary(manifest, time.perf_counter() - started, seconds, folder, console)
    return folder


def _pinned_revision(options: PreprocessOptions) -> str | None:
    """Returns the commit of the Hub dataset with which an earlier run of this command began."""
    size = options.dataset_size or DEFAULT_HUB_SIZE
    folder = options.output_dir / directory_name(options, size)
    source = earlier_identity(folder).get("source", {})
    return source.get("revision") if source.get("config") == size else None


def _trained_tokenizer(
    reading: Reading,
    cleaning: Cleaning,
    units: Sequence[Unit],
    options: PreprocessOptions,
    work: Path,
    console: Console,
) -> Tokenizer:
    """Trains a vocabulary on the training documents, or takes the one of an interrupted run."""
    vocabulary_size = vocabulary_size_to_train(options.tokenizer)
    assert vocabulary_size is not None
    file = work / _VOCABULARY_FILE
    if (json_bytes := read_sealed(file)) is not None:
        return parse_tokenizer(json_bytes, options.tokenizer)
    with console.status(f"Training a vocabulary of {vocabulary_size} entries"):
        share = (options.test_split, options.seed, options.chunk_size)
        texts = TrainingTexts(units, reading, cleaning, _word_limit(options), *share)
        missing = left_out(texts.rejected, _word_limit(options), texts.words_next)
        tokenizer = train_tokenizer(texts, vocabulary_size, missing)
    with sealed_file(file) as opened:
        opened.write(tokenizer.json_bytes)
    return tokenizer


def _finish_units(
    units: Sequence[Unit],
    job: UnitJob,
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    console: Console,
) -> dict[str, float]:
    """Finishes the units, or as many of them as the word limit needs; returns time per stage."""
    started = time.perf_counter()
    num_bytes = sum(unit.num_bytes for unit in units)
    finished_bytes = sum(path.stat().st_size for path in map(job.path, units) if path.exists())
    needed_bytes = _OUTPUT_BYTES_PER_TEXT_BYTE * num_bytes + len(tokenizer.json_bytes)
    require_free_space(job.folder, needed_bytes - finished_bytes, "the chunk directory")
    fast = fast_path(tokenizer, options.encoder)
    if options.encoder == "auto" and isinstance(fast, str):
        warn(console, f"encoding slowly with the tokenizers library: {fast}")
    limit = _word_limit(options)
    words: dict[int, int] = {}  # of finished units that wait for one before them
    num_words = num_units = 0  # of the units that are finished with all before them
    with ExitStack() as stack:
        if options.executor == "ray":
            places = (options.num_proc, options.ray_address)
            running = run_units_on_ray(units, job, tokenizer, options.encoder, *places)
        else:
            num_workers = min(options.num_proc or os.cpu_count() or 1, len(units))
            encoders = stack.enter_context(load_encoders(tokenizer, fast, num_workers))
            running = run_units(units, job, encoders)
        seconds = {"loading": time.perf_counter() - started}
        stack.enter_context(closing(running))
        progress = stack.enter_context(UnitProgress(num_bytes, console))
        for unit, summary in running:
            words[unit.number] = summary.words
            for stage, took in summary.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + took
            progress.advance(unit, summary)
            while num_units in words:
                num_words += words.pop(num_units)
                num_units += 1
            if limit is not None and num_words > limit:
                break
    return seconds


def _assemble(
    units: Sequence[Unit],
    job: UnitJob,
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    result: Path,
) -> dict[str, Any]:
    """Writes the chunk directory but for its manifest; returns what that says of the text."""
    limit, share = _word_limit(options), options.test_split
    fates = decide(units, job, share, options.chunk_size, limit)
    paths = [job.path(unit) for unit in units[: len(fates.per_unit)]]
    parts = list(zip(paths, fates.per_unit, strict=True))
    cut: dict[str, Any] = {}
    if fates.num_cut:
        encoder = Encoder(tokenizer, fast_path(tokenizer, options.encoder))
        documents = cut_documents(units, job, fates, encoder)
        parts.append((documents.path, documents.fate))
        cut["cut_for_test"] = documents.entry
    chunks = (options.chunk_size, options.packing)
    splits, num_unused_rows = write_splits(parts, tokenizer, *chunks, result)
    num_kept = sum(split["documents"] for split in splits.values())
    num_left_out = fates.rejected.total() + fates.num_beyond
    assert num_kept - fates.num_cut + num_left_out == fates.num_rows, "documents were lost"
    words_next = fates.limit.words_next if fates.limit else 0
    missing = left_out(fates.rejected, limit, words_next)
    _check_enough(splits, num_kept - fates.num_cut, options.chunk_size, missing)
    write_tokenizer(tokenizer, result)
    reached = fates.limit._asdict() if fates.limit else {}
    kept = {}
    if options.keep_rejected:
        kept["rejected_file"] = write_rejected(units, job, fates, result)
    pinned = {"sha256": tokenizer.sha256, "origin": tokenizer.origin}
    rows = {"num_rows": tokenizer.num_rows, "num_unused_rows": num_unused_rows}
    return {
        "kiem_version": kiem.__version__,
        "tokenizer": {**pinned, **rows},
        "special_ids": tokenizer.special_ids,
        "documents_read": fates.num_rows,
        "documents_per_file": fates.rows_per_file,
        "documents_beyond_limit": fates.num_beyond,
        "word_limit": {"words": limit, **reached} if limit else None,
        **cut,
        "rejected": dict(sorted(fates.rejected.items())),
        "rejected_per_file": fates.rejected_per_file,
        **kept,
        "splits": splits,
    }


def _word_limit(options: PreprocessOptions) -> int | None:
    # The Hub dataset has a config of every size, so nothing is left to cut there.
    return None if options.source == ("hub",) else word_limit(options.dataset_size)


def directory_name(options: PreprocessOptions, source_name: str) -> str:
    """Returns the name of the chunk directory: --name, or chunked_ and the size or source."""
    if options.name is not None:
        return check_name(options.name, "--name")
    if options.source == ("hub",) or options.dataset_size is None:
        return f"chunked_{source_name}"
    return f"chunked_{source_name}_{options.dataset_size}"


def _is_made(
    folder: Path, identity: dict[str, Any], options: PreprocessOptions, console: Console
) -> bool:
    """Says whether the chunk directory is there, whole; raises a UserError if it is another."""
    if options.overwrite or not folder.exists():
        return False
    refuse_other(folder, earlier_identity(folder), identity)
    verify_directory(folder)
    console.print(f"{folder} is there already, made of the same text; verified.")
    return True


def _identity(
    options: PreprocessOptions, source: Source, tokenizer: Tokenizer | None, cleaning: Cleaning
) -> dict[str, Any]:
    """What a chunk directory is made of, as the manifest records it."""
    return {
        "options": {
            "dataset_size": options.dataset_size,
            "chunk_size": options.chunk_size,
            "test_split": options.test_split,
            "seed": options.seed,
            "text_column": options.text_column,
            "document_separator": options.document_separator,
            "packing": options.packing,
            "on_bad_document": options.on_bad_document,
            **cleaning.identity,
            "keep_rejected": options.keep_rejected,
            "tokenizer": tokenizer.sha256 if tokenizer else options.tokenizer,
        },
        "source": source.description,
    }


def _check_enough(
    splits: dict[str, dict[str, Any]], num_kept: int, chunk_size: int, missing: str
) -> None:
    train, test = (splits[split]["tokens"] for split in ("train", "test"))
    if train < chunk_size:
        documents = "1 document has" if num_kept == 1 else f"{num_kept} documents have"
        smaller = f", or --chunk-size {train} or less" if train >= MIN_CHUNK_SIZE else ""
        raise UserError(
            f"{documents} {train + test} tokens; without {test} for testing that is {train}, less "
            f"than one chunk of {chunk_size}{missing}",
            where="--source",
            fix=f"Use more text{smaller}.",
            exit_code=ExitCode.DATASET_TOO_SMALL,
        )
