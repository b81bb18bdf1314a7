"""The command `kiem evaluate`: documents, suites and model in, tables and JSON out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from kiem.config import EvaluationOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, bad_input, bad_option, no_effect
from kiem.core.files import check_new_file, format_bytes, write_json
from kiem.core.json_input import JsonError, parse_json, read_json
from kiem.core.manifest import MANIFEST_FILE
from kiem.core.values import given_options, option_flag
from kiem.data.chunks import (
    ChunkOptions,
    Chunks,
    open_split,
    open_test_sources,
    read_manifest,
    read_tokenizer,
)
from kiem.data.prepare.verify import verify_shards
from kiem.data.read.hub_dataset import HUB_PREFIX
from kiem.data.read.readers import check_effects, read_documents
from kiem.data.read.rows import Document
from kiem.data.read.sources import resolve_source
from kiem.evaluation.bits_per_byte import bits_per_byte, measure
from kiem.evaluation.foreign import open_foreign_model
from kiem.evaluation.language_model import LanguageModel, own_language_model
from kiem.evaluation.minimal_pairs import BUILT_IN, prefers_good, read_suite, summarize
from kiem.inference.loading import load_for_inference
from kiem.model.config import CONFIG_FILE
from kiem.model.io import find_model
from kiem.parallel.launch import use_processors

_MOST_SOURCES_SHOWN = 50
_TEXT_OPTIONS = ("text_column", "document_separator")


class _Data(msgspec.Struct):
    options: ChunkOptions


class _Summary(msgspec.Struct):
    """The part of training_summary.json that is read here."""

    data: _Data


def evaluate(options: EvaluationOptions, console: Console) -> dict[str, Any]:
    """Measures a model, prints the tables, and returns what `--json` writes.

    Raises:
        UserError: an option, the data, the suite or the model cannot be used.
    """
    if not options.data:
        _refuse(options, ("max_documents", *_TEXT_OPTIONS), "without --data")
    if options.json is not None:
        check_new_file(options.json)
    names = options.suite or (() if options.data else (BUILT_IN,))
    pairs = read_suite(names, console) if names else []
    documents = evaluation_documents(options, console) if options.data else iter(())
    use_processors(console)
    model = open_language_model(options.model_path, options.precision, options.context)
    results: dict[str, Any] = {"model": options.model_path, "context": model.context}
    started = time.perf_counter()
    if options.data:
        with console.status("bits per byte"):
            results |= _measure_text(model, documents, options, console)
    if pairs:
        with console.status("minimal pairs"):
            results["suite"] = list(names)
            results["minimal_pairs"] = summarize(pairs, prefers_good(model, pairs))
    results["seconds"] = time.perf_counter() - started
    _show(results, console)
    if options.json is not None:
        write_json(options.json, results)
    return results


def _refuse(options: EvaluationOptions, names: Sequence[str], why: str) -> None:
    """Raises a UserError if one of these options is given."""
    given = given_options(options)
    for name in names:
        if name in given:
            raise no_effect(option_flag(name), why)


def evaluation_documents(options: EvaluationOptions, console: Console) -> Iterator[Document]:
    """Returns the documents of `--data`; what can be checked without reading is checked at once.

    Raises:
        UserError: there is no such file, or a line or row is no document; names it.
    """
    first = Path(options.data[0])
    if len(options.data) == 1 and (first / MANIFEST_FILE).is_file():
        _refuse(options, _TEXT_OPTIONS, "with a chunk directory")
        return islice(_test_split(first), options.max_documents)
    if of_hub := [name for name in options.data if name == "hub" or name.startswith(HUB_PREFIX)]:
        fix = "Give the chunk directory that preprocess.py made of it."
        raise bad_option(f"--data {of_hub[0]}", "is not text that was kept apart", fix)
    separator = options.document_separator
    source = resolve_source(
        options.data, None, console=console, option="--data", document_separator=separator
    )
    check_effects(source, options.text_column)
    fix = "Correct or remove it, or name the text's column with --text-column."
    documents = read_documents(source, options.text_column, fix)
    return islice(documents, options.max_documents)


def _test_split(folder: Path) -> Iterator[Document]:
    """Returns the test documents of a chunk directory, decoded to text."""
    manifest = read_manifest(folder)
    if manifest["options"].get("packing", "concat") != "concat":
        what = "the documents of this chunk directory are not in one piece (--packing best-fit)"
        raise bad_input(f"--data {folder}", what, "Give files of text.")
    tokenizer = read_tokenizer(folder, manifest)
    verify_shards(folder, manifest)
    ids = _tokens(open_split(folder, manifest, "test"))
    starts = np.flatnonzero(ids == tokenizer.bos_id)
    names = ["test split"] * len(starts)
    if (sources := open_test_sources(folder, manifest)) is not None:
        known = manifest["splits"]["test"]["source_names"]
        names = [known[number] for number in _tokens(sources)[starts]]
    documents = zip(np.split(ids, starts)[1:], names, strict=True)
    return (
        Document(tokenizer.decode(document.tolist()), name, number)
        for number, (document, name) in enumerate(documents, start=1)
    )


def _tokens(chunks: Chunks) -> np.ndarray:
    return np.concatenate([block.reshape(-1) for block in chunks.blocks])


def open_language_model(
    name: str, precision: Literal["auto", "fp32", "bf16"], context: int | None
) -> LanguageModel:
    """Loads a model for evaluation: a Gemma 3 text model, or another one through transformers.

    Args:
        name: a folder or Hub id.
        precision: of the weights.
        context: most tokens in a row; None: the chunk size of a kiem model's training, the longest
            context of other models.

    Raises:
        UserError: there is no such model, or transformers is needed and not installed.
    """
    folder = find_model(name)
    try:
        config = parse_json((folder / CONFIG_FILE).read_bytes())
    except (OSError, JsonError):  # loading explains it
        config = None
    if isinstance(config, dict) and config.get("model_type", "gemma3_text") != "gemma3_text":
        return open_foreign_model(folder, precision, context)
    loaded = load_for_inference(str(folder), precision)
    summary = folder / "training_summary.json"
    if context is None and summary.is_file():
        fix = "Remove the file and give --context."
        read = read_json(summary, _Summary, fix=fix, exit_code=ExitCode.DAMAGED)
        context = read.data.options.chunk_size
    context = context or loaded.model.config.max_position_embeddings
    return own_language_model(loaded.model, loaded.tokenizer, context)


def _measure_text(
    model: LanguageModel,
    documents: Iterator[Document],
    options: EvaluationOptions,
    console: Console,
) -> dict[str, Any]:
    measured = measure(model, documents)
    if not measured.sources:
        raise bad_input(f"--data {options.data[0]}", "there is no document", "Give files of text.")
    if measured.num_unknown:
        warn(
            console,
            f"{measured.num_unknown:,} tokens stand for text that the tokenizer cannot express; "
            "the model need not predict that text, so its bits per byte are too low",
        )
    names = sorted(set(measured.sources))
    return {
        **bits_per_byte(measured, None, options.seed),
        "per_source": {name: bits_per_byte(measured, name, options.seed) for name in names},
    }


def _show(results: dict[str, Any], console: Console) -> None:
    if "bpb" in results:
        title = f"bits per byte, context of {results['context']:,} tokens"
        table = Table("source", "bits per byte", "95 %", "documents", "text", "tokens", title=title)
        lines = list(results["per_source"].items()) if len(results["per_source"]) > 1 else []
        for name, line in [*lines[:_MOST_SOURCES_SHOWN], ("all", results)]:
            interval = f"{line['bpb_low']:.3f} to {line['bpb_high']:.3f}"
            counts = f"{line['documents']:,}", format_bytes(line["bytes"]), f"{line['tokens']:,}"
            table.add_row(name, f"{line['bpb']:.4f}", interval, *counts)
        console.print(table)
        if len(lines) > _MOST_SOURCES_SHOWN:
            console.print(f"{len(lines) - _MOST_SOURCES_SHOWN} more sources are in --json FILE")
    if "minimal_pairs" in results:
        found = results["minimal_pairs"]
        table = Table("phenomenon", "correct", "95 %", "pairs", title="minimal pairs")
        for name, line in [*found["phenomena"].items(), ("all", found)]:
            interval = f"{line['accuracy_low']:.0%} to {line['accuracy_high']:.0%}"
            table.add_row(name, f"{line['accuracy']:.1%}", interval, f"{line['pairs']:,}")
        console.print(table)
