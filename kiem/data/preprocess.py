"""Preprocessing from end to end: documents in, a chunk directory out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import kiem
from kiem.cli import warn
from kiem.config import PreprocessOptions
from kiem.data.chunks import SplitWriter, finish_directory, read_manifest, verify_shards
from kiem.data.encoding import Encoded, Encoder, prepare_fast_path
from kiem.data.packing import Packer, frame
from kiem.data.sources import (
    DEFAULT_HUB_SIZE,
    Document,
    Source,
    check_hub_size,
    read_documents,
    resolve_source,
    take_words,
    word_limit,
)
from kiem.data.split import Split, split_documents
from kiem.data.summary import print_summary
from kiem.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size_to_train,
    write_tokenizer,
)
from kiem.errors import ExitCode, UserError
from kiem.files import check_name, new_folder, require_free_space

_BATCH_CHARACTERS = 8_000_000
# Four bytes a token, and Dutch has 3 to 5 bytes of text a token; more where files are compressed.
_OUTPUT_BYTES_PER_TEXT_BYTE = 2


@dataclass
class SplitCounts:
    """What went into one split."""

    documents: int = 0
    words: int = 0
    bytes: int = 0
    tokens: int = 0
    chunks: int = 0
    padding_tokens: int = 0
    bytes_per_source: Counter[str] = field(default_factory=Counter)


def preprocess(options: PreprocessOptions, console: Console) -> Path:
    """Makes a chunk directory of the text that the options name.

    Args:
        options: all options of preprocess.py.
        console: where progress and the closing table go.

    Returns:
        The chunk directory. If it exists already, made of the same text with the same options, it
        is verified and left as it is.

    Raises:
        UserError: anything about the options, the text, the Hub or the disk that a person can mend.
    """
    _check_options(options)
    vocabulary_size = vocabulary_size_to_train(options.tokenizer)
    if options.num_proc is not None:
        os.environ["RAYON_NUM_THREADS"] = str(options.num_proc)
    # Local files first, since that is quick; but the tokenizer before the Hub's gigabytes of text,
    # which are useless without it.
    is_local = options.source != ("hub",)
    source = resolve_source(options.source, options.dataset_size) if is_local else None
    tokenizer = None if vocabulary_size else load_tokenizer(options.tokenizer)
    source = source or resolve_source(options.source, options.dataset_size)
    folder = options.output_dir / directory_name(options, source)
    identity = _identity(options, source, tokenizer)
    if folder.exists() and not options.overwrite:
        _check_same(folder, identity)
        console.print(f"{folder} is there already, made of the same text; verified.")
        return folder

    def documents() -> Iterator[tuple[Split, Document]]:
        found = read_documents(source, options.text_column)
        if source.description["kind"] != "hub":
            found = take_words(found, word_limit(options.dataset_size))
        return split_documents(found, options.test_split, options.seed)

    started = time.perf_counter()
    if tokenizer is None:
        assert vocabulary_size is not None
        with console.status(f"Training a vocabulary of {vocabulary_size} entries"):
            texts = (document.text for split, document in documents() if split == "train")
            tokenizer = train_tokenizer(texts, vocabulary_size)
    encoder = Encoder(
        tokenizer,
        prepare_fast_path(tokenizer.json_bytes)
        if options.encoder == "auto"
        else "as asked for with --encoder reference",
    )
    if encoder.reason is not None and options.encoder == "auto":
        warn(console, f"encoding slowly with the tokenizers library: {encoder.reason}")
    text_bytes = sum(path.stat().st_size for path in source.paths)
    require_free_space(
        options.output_dir, _OUTPUT_BYTES_PER_TEXT_BYTE * text_bytes, "the chunk directory"
    )
    with new_folder(folder, overwrite=options.overwrite) as unfinished:
        splits = _write_splits(
            documents(), tokenizer, encoder, options.chunk_size, unfinished, console
        )
        write_tokenizer(tokenizer, unfinished)
        _check_enough(splits, options)
        pinned = {"sha256": tokenizer.sha256, "origin": tokenizer.origin}
        manifest = {
            **identity,
            "kiem_version": kiem.__version__,
            "tokenizer": {**pinned, "num_rows": tokenizer.num_rows},
            "special_ids": tokenizer.special_ids,
            "splits": splits,
        }
        finish_directory(unfinished, manifest)
    print_summary(manifest, time.perf_counter() - started, folder, console)
    return folder


def directory_name(options: PreprocessOptions, source: Source) -> str:
    """Returns the name of the chunk directory: --name, or chunked_ and the size or source."""
    if options.name is not None:
        return check_name(options.name, "--name")
    if source.description["kind"] == "hub" or options.dataset_size is None:
        return f"chunked_{source.name}"
    return f"chunked_{source.name}_{options.dataset_size}"


def _write_splits(
    documents: Iterator[tuple[Split, Document]],
    tokenizer: Tokenizer,
    encoder: Encoder,
    chunk_size: int,
    folder: Path,
    console: Console,
) -> dict[str, dict[str, Any]]:
    splits: tuple[Split, ...] = ("train", "test")
    writers = {split: SplitWriter(folder / split, chunk_size) for split in splits}
    packers = {split: Packer(chunk_size, tokenizer.pad_id) for split in splits}
    counts = {split: SplitCounts() for split in splits}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Tokenizing")
        started = time.perf_counter()
        for batch, encoded in _encoded_batches(documents, encoder):
            framed = frame(encoded, tokenizer.bos_id, tokenizer.eos_id)
            for split in splits:
                chosen = np.array([name == split for name, _ in batch])
                packers[split].add(framed.ids[np.repeat(chosen, framed.lengths)])
                counts[split].tokens += int(framed.lengths[chosen].sum())
                writers[split].write(packers[split].full_chunks())
            for split, document in batch:
                _count(counts[split], document)
            tokens = sum(count.tokens for count in counts.values())
            done = sum(count.documents for count in counts.values())
            rate = tokens / (time.perf_counter() - started)
            progress.update(
                task, description=f"{done:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s"
            )
    entries: dict[str, dict[str, Any]] = {}
    for split in splits:
        writers[split].write(packers[split].last_chunk())
        shards = writers[split].close()
        count = counts[split]
        count.chunks = sum(shard["chunks"] for shard in shards)
        count.padding_tokens = count.chunks * chunk_size - count.tokens
        assert 0 <= count.padding_tokens < chunk_size, "tokens were lost"
        entries[split] = {
            **dataclasses.asdict(count),
            "bytes_per_source": dict(sorted(count.bytes_per_source.items())),
            "rejected": {},
            "shards": shards,
        }
    return entries


def _encoded_batches(
    documents: Iterator[tuple[Split, Document]], encoder: Encoder
) -> Iterator[tuple[list[tuple[Split, Document]], Encoded]]:
    """Yields batches with their ids; encodes one while the next is being read."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[tuple[list[tuple[Split, Document]], Future[Encoded]]] = deque()
        for batch in _batches(documents):
            texts = [document.text for _, document in batch]
            places = [document.place for _, document in batch]
            waiting.append((batch, pool.submit(encoder.encode, texts, places)))
            if len(waiting) == 2:
                batch, encoded = waiting.popleft()
                yield batch, encoded.result()
        for batch, encoded in waiting:
            yield batch, encoded.result()


def _batches(
    documents: Iterator[tuple[Split, Document]],
) -> Iterator[list[tuple[Split, Document]]]:
    batch: list[tuple[Split, Document]] = []
    num_characters = 0
    for split, document in documents:
        batch.append((split, document))
        num_characters += len(document.text)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _count(counts: SplitCounts, document: Document) -> None:
    num_bytes = len(document.text.encode())
    counts.documents += 1
    counts.words += len(document.text.split())
    counts.bytes += num_bytes
    counts.bytes_per_source[document.source] += num_bytes


def _check_options(options: PreprocessOptions) -> None:
    def bad(where: str, what: str, fix: str) -> UserError:
        return UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_OPTION)

    if options.chunk_size < 16:
        raise bad("--chunk-size", f"{options.chunk_size} is too small", "Give at least 16.")
    if not 0 < options.test_split < 1:
        raise bad("--test-split", f"{options.test_split} is not a share", "Give one such as 0.002.")
    if options.num_proc is not None and options.num_proc < 1:
        raise bad("--num-proc", f"{options.num_proc} is too few", "Give 1 or more.")
    if options.source == ("hub",):
        check_hub_size(options.dataset_size or DEFAULT_HUB_SIZE)
    if options.text_column != "text" and (
        options.source == ("sample",) or all(name.endswith(".txt") for name in options.source)
    ):
        raise UserError(
            "has no effect: this source has no columns",
            where="--text-column",
            fix="Leave it out, or give .jsonl, .jsonl.gz or .parquet files with --source.",
            exit_code=ExitCode.NO_EFFECT,
        )


def _identity(
    options: PreprocessOptions, source: Source, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """What a chunk directory is made of, as the manifest records it."""
    return {
        "options": {
            "dataset_size": options.dataset_size,
            "chunk_size": options.chunk_size,
            "test_split": options.test_split,
            "seed": options.seed,
            "text_column": options.text_column,
            "tokenizer": tokenizer.sha256 if tokenizer else options.tokenizer,
        },
        "source": source.description,
    }


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    manifest = read_manifest(folder)
    different = [
        f"--{name.replace('_', '-')} was {manifest['options'].get(name)!r}"
        for name, value in identity["options"].items()
        if manifest["options"].get(name) != value
    ]
    if manifest["source"] != identity["source"]:
        different.append("--source was other text")
    if different:
        raise UserError(
            f"this chunk directory was made differently: {'; '.join(different)}",
            where=str(folder),
            fix="Choose another --name, or replace it with --overwrite.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )
    verify_shards(folder, manifest)


def _check_enough(splits: dict[str, dict[str, Any]], options: PreprocessOptions) -> None:
    train = splits["train"]
    if train["tokens"] < options.chunk_size:
        num_documents = train["documents"] + splits["test"]["documents"]
        raise UserError(
            f"the training split of these {num_documents} documents has {train['tokens']} tokens, "
            f"too few for one chunk of {options.chunk_size}",
            where="--source",
            fix="Use more text, a larger --dataset-size or a smaller --chunk-size.",
            exit_code=ExitCode.DATASET_TOO_SMALL,
        )
