"""What people see of preprocessing: the progress display, and the table at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kiem.core.files import format_bytes
from kiem.data.chunks import REJECTED_FILE
from kiem.data.prepare.unit_files import UnitSummary
from kiem.data.prepare.units import Unit


class UnitProgress:
    """A bar with documents, MB and tokens per second and the time left.

    Args:
        total_bytes: bytes of all units.
        console: where it is shown.
    """

    def __init__(self, total_bytes: int, console: Console):
        text = TextColumn("{task.description}", markup=False)
        share = TextColumn("{task.percentage:.0f} %", markup=False)
        columns = (text, BarColumn(), share, TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("starting", total=total_bytes)
        self._counts: Counter[str] = Counter()
        self._started = time.perf_counter()

    def __enter__(self) -> UnitProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, unit: Unit, summary: UnitSummary) -> None:
        """Shows that a unit is finished."""
        self._counts.update(documents=summary.documents, tokens=summary.tokens, bytes=summary.bytes)
        seconds = time.perf_counter() - self._started
        rate = {name: number / seconds for name, number in self._counts.items()}
        self._bar.update(
            self._task,
            advance=unit.num_bytes,
            description=f"{self._counts['documents']:,} documents "
            f"({rate['documents']:,.0f}/s, {rate['bytes'] / 1e6:,.1f} MB/s, "
            f"{rate['tokens']:,.0f} tokens/s)",
        )


def print_summary(
    manifest: dict[str, Any],
    seconds: float,
    stage_seconds: dict[str, float],
    folder: Path,
    console: Console,
) -> None:
    """Prints what is in a chunk directory and how fast it was made.

    Args:
        manifest: of the chunk directory.
        seconds: how long it took.
        stage_seconds: processor time of each stage, summed over the workers.
        folder: the chunk directory.
        console: where to print.
    """
    table = Table("", "train", "test", title=str(folder), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    splits = [manifest["splits"][name] for name in ("train", "test")]
    for name in ("documents", "words", "tokens", "chunks", "padding_tokens"):
        table.add_row(name.replace("_", " "), *(f"{split[name]:,}" for split in splits))
    table.add_row("text", *(format_bytes(split["bytes"]) for split in splits))
    table.add_row(
        "bytes per token", *(f"{split['bytes'] / max(1, split['tokens']):.2f}" for split in splits)
    )
    console.print(table)
    for line in _account(manifest):
        console.print(line, markup=False)
    if rejected := manifest["rejected"]:
        total, num_read = sum(rejected.values()), manifest["documents_read"]
        console.print(f"rejected {total:,} of {num_read:,} documents: {_reasons(rejected)}")
        if "rejected_file" in manifest:
            console.print(f"they are in {folder / REJECTED_FILE}")
    tokens = sum(split["tokens"] for split in splits)
    num_rows = manifest["tokenizer"]["num_rows"]
    num_unused = manifest["tokenizer"]["num_unused_rows"]
    console.print(
        f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s); "
        f"vocabulary of {num_rows:,} rows, of which the text never uses {num_unused:,}"
    )
    slowest = max(stage_seconds, key=lambda stage: stage_seconds[stage])
    shares = ", ".join(f"{stage} {took:.1f} s" for stage, took in stage_seconds.items())
    console.print(f"slowest stage: {slowest} ({shares}; summed over the worker processes)")


def left_out(rejected: Mapping[str, int], limit: int | None, words_next: int) -> str:
    """Returns what an error that there is too little text adds, "" if nothing was left out.

    Args:
        rejected: documents that were rejected, by reason.
        limit: of words.
        words_next: of the first document beyond it; 0: there is none.
    """
    said = ""
    if any(rejected.values()):
        total = sum(rejected.values())
        said += f"; {total:,} {'was' if total == 1 else 'were'} rejected ({_reasons(rejected)})"
    if limit is not None and words_next:
        said += (
            f"; the limit of {limit:,} words (--dataset-size) leaves out all from a document of "
            f"{words_next:,} words on"
        )
    return said


def _reasons(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(rejected.items()) if n)


def _account(manifest: dict[str, Any]) -> Iterator[str]:
    """Yields lines that say what became of every document."""
    train, test = (manifest["splits"][name]["documents"] for name in ("train", "test"))
    rejected = sum(manifest["rejected"].values())
    num_read, per_file = manifest["documents_read"], manifest["documents_per_file"]
    num_beyond, limit = manifest["documents_beyond_limit"], manifest["word_limit"]
    files = "1 file" if len(per_file) == 1 else f"{len(per_file):,} files"
    cut = manifest.get("cut_for_test")
    again = f", {cut['documents']:,} of them cut in two" if cut else ""
    yield (
        f"documents: {num_read:,} read from {files}{again} = {train:,} for training + {test:,} for "
        f"testing + {rejected:,} rejected"
        + (f" + {num_beyond:,} beyond the word limit" if num_beyond else "")
    )
    if cut:
        kind = {"paragraph": "a paragraph", "line": "a line", "sentence": "a sentence"}
        yield (
            f"the documents are few and large, so the test split is the end of {cut['at']}: "
            f"{format_bytes(cut['test_bytes'])} after {kind.get(cut['border'], cut['border'])}"
        )
    if num_beyond:
        num_files = limit["files_not_read"]
        after = f"; {num_files:,} more files were not read" if num_files else ""
        yield (
            f"the limit of {limit['words']:,} words was reached in {limit['reached_in']}, after "
            f"{limit['words_taken']:,} words: no document from there on was taken{after}"
        )
    if empty := [name for name, number in per_file.items() if number == 0]:
        more = f" and {len(empty) - 3:,} more" if len(empty) > 3 else ""
        yield f"without any document: {', '.join(empty[:3])}{more}"
