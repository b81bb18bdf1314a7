"""The table at the end of preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kiem.files import format_bytes


def print_summary(manifest: dict[str, Any], seconds: float, folder: Path, console: Console) -> None:
    """Prints what is in a chunk directory and how fast it was made."""
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
    tokens = sum(split["tokens"] for split in splits)
    console.print(
        f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s); "
        f"vocabulary of {manifest['tokenizer']['num_rows']:,} rows"
    )
