"""report.html: one self-contained page about a run, or about several side by side."""

from __future__ import annotations

import functools
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
from kiem.report.branches import branches
from kiem.report.charts import bars, curves
from kiem.report.comparison import compare_ways
from kiem.report.record import Record, read_record

REPORT_FILE = "report.html"
_MOST_SAMPLES = 12
_MOST_KEYS = 20  # there may be a thousand sources


def report(options: ReportOptions, console: Console) -> None:
    """Runs report.py; errors as of `write_report`."""
    output = options.output
    if output is None:
        is_one = len(options.runs) == 1
        output = options.runs[0] / REPORT_FILE if is_one else Path("comparison.html")
    records = [read_record(directory) for directory in options.runs]
    write_text(output, render(records, options.price))
    for name, (num_runs, bpb, gain) in compare_ways(records):
        console.print(f"{name}: {bpb} bits per byte ({num_runs} finished); {gain or 'the first'}")
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
    names, results = [r.name for r in records], [r.results for r in records]
    by_source = [result.per_source for result in results]
    found = [*branches(records)]
    by_phenomenon = [r.minimal_pairs.phenomena if r.minimal_pairs else {} for r in results]
    return fill_page(
        "template.html",
        records=records,
        title=" and ".join(names),
        status=[_status(record) for record in records],
        tiles=[_tiles(record, price) for record in records],
        ways=compare_ways(records),
        facts=_side_by_side([dict(_flat(record.metadata)) for record in records]),
        options=_side_by_side([dict(_flat(record.options)) for record in records]),
        curves=[*curves(records), *(chart for _, charts in found for chart in charts)],
        branches=[text for text, _ in found],
        per_source=bars(names, by_source, "bpb", "Bits per byte by source", "bits per byte"),
        minimal_pairs=bars(
            names, by_phenomenon, "accuracy", "Minimal pairs by phenomenon", "% chosen rightly", 100
        ),
        samples=[(record.name, _samples(record)) for record in records],
    )


def fill_page(template: str, **values: Any) -> str:
    """Returns a page of one of the templates here, with the styles and scripts that it needs."""
    found = _environment().get_template(template)
    library = _read_resource("chart.umd.min.js").rsplit("//# sourceMappingURL", 1)[0]
    return found.render(
        style=Markup(_read_resource("page.css")),
        library=Markup(library),
        script=Markup(_read_resource("page.js")),
        **values,
    )


@functools.cache
def _environment() -> jinja2.Environment:
    """Returns what compiles the templates, each once: a training writes its report many times."""
    return jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_read_resource),
    )


def _status(record: Record) -> str:
    if finished := record.results.finished:
        return f"finished {finished.replace('T', ' ')[:16]} UTC"
    last = record.updates[-1].step if record.updates else 0
    return f"at step {last:,}: running, or stopped"


def _tiles(record: Record, price: float | None) -> Iterator[tuple[str, str]]:
    """Yields names and values of the most important figures, as far as they are known."""
    if record.evaluations:
        last = record.evaluations[-1]
        yield "test bits per byte", f"{last.test_bpb:.3f}"
        yield "test loss", f"{last.test_loss:.3f}"
    if record.results.minimal_pairs is not None:
        yield "minimal pairs", f"{record.results.minimal_pairs.accuracy:.1%}"
    if record.updates:
        last = record.updates[-1]
        yield "tokens", f"{last.tokens:,}"
        yield "time", _duration(last.seconds)
        yield "tokens per second", f"{last.tokens / max(last.seconds, 1e-9):,.0f}"
        if last.memory_bytes is not None:
            yield "peak memory of a process", format_bytes(last.memory_bytes)
        price = record.price if price is None else price
        if price is not None:
            yield f"cost at {price:,.2f} an hour", f"{price * last.seconds / 3600:,.2f}"


def _samples(record: Record) -> list[tuple[str, list[tuple[int, str]]]]:
    """Returns the model's continuations of every prompt, a limited number over the run."""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in record.evaluations:
        for sample in line.samples:
            found.setdefault(sample.prompt, []).append((line.step, printable(sample.text)))
    for prompt, texts in found.items():
        places = {i * (len(texts) - 1) // (_MOST_SAMPLES - 1) for i in range(_MOST_SAMPLES)}
        found[prompt] = [texts[place] for place in sorted(places)]
    return list(found.items())


def _flat(values: dict[str, Any], depth: int = 3) -> Iterator[tuple[str, str]]:
    """Yields the keys and texts of what a file says, but for its long lists and deep objects."""
    for key, value in values.items():
        if not isinstance(value, dict):
            yield key, f"{value:,}" if type(value) is int else str(value)
        elif depth > 1 and len(value) <= _MOST_KEYS:
            yield from ((f"{key} {rest}", text) for rest, text in _flat(value, depth - 1))


def _side_by_side(columns: list[dict[str, str]]) -> list[tuple[str, list[str], bool]]:
    """Returns rows of a name, each run's value, and whether these differ."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name, "") for column in columns]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _read_resource(name: str) -> str:
    return resources.files("kiem.report").joinpath(name).read_text(encoding="utf-8")
