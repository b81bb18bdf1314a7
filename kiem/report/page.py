"""report.html: one self-contained page about a run, or about several side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Console

from kiem.config import ReportOptions
from kiem.core.console import printable
from kiem.core.files import format_bytes, write_text
from kiem.report.card import describe
from kiem.report.charts import curves, minimal_pair_bars, per_source_bars, text_bars
from kiem.report.record import Record, read_record

REPORT_FILE = "report.html"
_MOST_SAMPLES = 12


def report(options: ReportOptions, console: Console) -> None:
    """Runs report.py; errors as of `write_report`."""
    output = options.output
    if output is None:
        is_one = len(options.runs) == 1
        output = options.runs[0] / REPORT_FILE if is_one else Path("comparison.html")
    write_report(options.runs, output, options.price)
    console.print(str(output))


def write_report(directories: Sequence[Path], output: Path, price: float | None = None) -> None:
    """Writes the report of one or several runs, whether finished or not.

    Args:
        directories: run directories.
        output: the page to write.
        price: of an hour on the hardware. Default: that of the run's options.

    Raises:
        UserError: a folder is no run directory, or the page cannot be written.
    """
    write_text(output, render([read_record(directory) for directory in directories], price))


def render(records: Sequence[Record], price: float | None = None) -> str:
    """Returns the page as HTML; see `write_report`."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    library = _read_resource("chart.umd.min.js").rsplit("//# sourceMappingURL", 1)[0]
    return environment.from_string(_read_resource("template.html")).render(
        records=records,
        title=" and ".join(record.name for record in records),
        style=Markup(_read_resource("page.css")),
        library=Markup(library),
        script=Markup(_read_resource("page.js")),
        status=[_status(record) for record in records],
        tiles=[_tiles(record, price) for record in records],
        facts=_side_by_side([dict(_described(record)) for record in records]),
        options=_side_by_side([{k: _shown(v) for k, v in r.options.items()} for r in records]),
        curves=curves(records),
        per_source=per_source_bars(records),
        minimal_pairs=minimal_pair_bars(records),
        text=text_bars(records),
        samples=[(record.name, _samples(record)) for record in records],
        vocabulary=[(record.name, *use) for record in records for use in _vocabulary_use(record)],
        costs=_side_by_side([dict(_costs(record, price)) for record in records]),
    )


def _status(record: Record) -> str:
    if finished := record.metadata.get("finished"):
        return f"finished {finished.replace('T', ' ')[:16]} UTC"
    last = record.updates[-1]["step"] if record.updates else 0
    most = record.metadata.get("recipe", {}).get("max_steps")
    return f"at step {last:,}{f' of {most:,}' if most else ''}: running, or stopped"


def _described(record: Record) -> Iterator[tuple[str, str]]:
    return describe(record.metadata) if "model" in record.metadata else iter(())


def _tiles(record: Record, price: float | None) -> Iterator[tuple[str, str]]:
    """Yields names and values of the most important figures."""
    if record.evaluations:
        last = record.evaluations[-1]
        yield "test bits per byte", f"{last['test_bpb']:.3f}"
        yield "test loss", f"{last['test_loss']:.3f}"
    if "minimal_pairs" in record.metadata:
        yield "minimal pairs", f"{record.metadata['minimal_pairs']['accuracy']:.1%}"
    if record.updates:
        last = record.updates[-1]
        yield "tokens", _large(last["tokens"])
        yield "time", _duration(last["seconds"])
        yield "tokens per second", _large(last["tokens"] / max(last["seconds"], 1e-9))
    yield from ((name, text) for name, text in _costs(record, price) if name == "cost")


def _costs(record: Record, price: float | None) -> Iterator[tuple[str, str]]:
    """Yields time, memory and money, as far as they are known."""
    if not record.updates:
        return
    last = record.updates[-1]
    yield "training time", _duration(last["seconds"])
    if "memory_bytes" in last:
        yield "peak memory of a process", format_bytes(last["memory_bytes"])
    price = record.options.get("price") if price is None else price
    if price is not None:
        yield "price per hour", f"{price:,.2f}"
        yield "cost", f"{price * last['seconds'] / 3600:,.2f}"


def _samples(record: Record) -> list[tuple[str, list[tuple[int, str]]]]:
    """Returns the model's continuations of every prompt, a limited number over the run."""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in record.evaluations:
        for sample in line.get("samples", ()):
            found.setdefault(sample["prompt"], []).append((line["step"], printable(sample["text"])))
    for prompt, texts in found.items():
        num_kept = min(_MOST_SAMPLES, len(texts))
        places = [round(i * (len(texts) - 1) / max(1, num_kept - 1)) for i in range(num_kept)]
        found[prompt] = [texts[place] for place in places]
    return list(found.items())


def _vocabulary_use(record: Record) -> Iterator[tuple[int, int]]:
    """Yields how many rows of the vocabulary the text uses, and how many there are, if known."""
    tokenizer = record.metadata.get("tokenizer", {})
    if "num_unused_rows" in tokenizer:
        yield tokenizer["num_rows"] - tokenizer["num_unused_rows"], tokenizer["num_rows"]


def _side_by_side(columns: list[dict[str, str]]) -> list[tuple[str, list[str], bool]]:
    """Returns rows of a name, each run's value, and whether these differ."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, "") for column in columns]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _large(number: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def _read_resource(name: str) -> str:
    return resources.files("kiem.report").joinpath(name).read_text(encoding="utf-8")
