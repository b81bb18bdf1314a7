"""Summary of a chunk directory for users: its counts, and what happened to the documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from kiem.core.files import format_bytes
from kiem.data.chunks import REJECTED_FILE


def print_summary(manifest: dict[str, Any], seconds: float, folder: Path, console: Console) -> None:
    """Prints what is in a chunk directory and how fast it was made."""
    numbers = [Column(name, justify="right") for name in ("train", "test")]
    table = Table("", *numbers, title=str(folder), title_justify="left")
    splits = [manifest["splits"][name] for name in ("train", "test")]
    for name in ("documents", "words", "tokens", "chunks", "padding_tokens"):
        table.add_row(name.replace("_", " "), *(f"{split[name]:,}" for split in splits))
    table.add_row("text", *(format_bytes(split["bytes"]) for split in splits))
    ratios = (split["bytes"] / max(1, split["tokens"]) for split in splits)
    table.add_row("bytes per token", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    for line in _account(manifest):
        console.print(line)
    if "rejected_file" in manifest:
        console.print(f"rejected documents are in {folder / REJECTED_FILE}")
    tokens = sum(split["tokens"] for split in splits)
    num_rows = manifest["tokenizer"]["num_rows"]
    num_unused = manifest["tokenizer"]["num_unused_rows"]
    console.print(
        f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s); "
        f"vocabulary of {num_rows:,} rows, of which the text never uses {num_unused:,}"
    )


def describe_left_out(counts: dict[str, Any]) -> str:
    """Returns the end of a message about too little text: what was left out, "" if nothing."""
    left_out = dict(counts["rejected"])
    if num_beyond := counts["documents_beyond_limit"]:
        left_out["beyond --dataset-size"] = num_beyond
    return f"; left out: {_reasons(left_out)}" if left_out else ""


def _reasons(rejected: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(rejected.items()))


def _account(manifest: dict[str, Any]) -> Iterator[str]:
    """Yields lines that account for every document."""
    train, test = (manifest["splits"][name]["documents"] for name in ("train", "test"))
    rejected, num_rejected = manifest["rejected"], sum(manifest["rejected"].values())
    num_read, per_file = manifest["documents_read"], manifest["documents_per_file"]
    num_beyond, limit = manifest["documents_beyond_limit"], manifest["word_limit"]
    files = "1 file" if len(per_file) == 1 else f"{len(per_file):,} files"
    cut = manifest.get("cut_for_test")
    again = f", {cut['documents']:,} of them cut in two" if cut else ""
    beyond = f" + {num_beyond:,} beyond the word limit" if num_beyond else ""
    yield (
        f"documents: {num_read:,} read from {files}{again} = {train:,} for training + {test:,} for "
        f"testing + {num_rejected:,} rejected{beyond}"
    )
    if cut:
        yield (
            "the documents are few and large, so the test split is the end of "
            f"{cut['places'][0]}: {format_bytes(cut['test_bytes'])} after a {cut['border']}"
        )
    if num_beyond:
        yield (
            f"the limit of {limit['words']:,} words was reached in {limit['reached_in']}, after "
            f"{limit['words_taken']:,} words: no document from there on was taken; "
            f"{limit['files_not_read']:,} more files were not read"
        )
    if empty := [name for name, number in per_file.items() if number == 0]:
        yield f"files without any document: {len(empty):,}, such as {empty[0]}"
    if parts := manifest["splits"]["train"].get("parts"):
        total = sum(part["weight"] for part in parts)
        shares = (
            f"{p['source']} {p['weight'] / total:.0%} ({p['chunks']:,} chunks)" for p in parts
        )
        yield f"training reads {', '.join(shares)}"
    if "personal_data_replaced" in manifest:
        replaced = manifest["personal_data_replaced"]
        found = ", ".join(f"{number:,} {kind}" for kind, number in replaced.items())
        yield f"personal data replaced in the documents that are kept: {found}"
    if rejected:
        yield f"rejected {num_rejected:,} of {num_read:,} documents: {_reasons(rejected)}"
