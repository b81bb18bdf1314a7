"""What a ladder tells, on the terminal and as report.html: rungs, forecast and learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from kiem.core.files import write_text
from kiem.model.config import preset
from kiem.planning.forecast import FEWEST_RUNGS, Law, check_law, fit_law
from kiem.planning.ladder_runs import LadderRun, Rung, extent, rungs_of
from kiem.planning.transfer import check_rates, fit_rates
from kiem.report.page import fill_page

# What is forecast: at 20 tokens for each parameter, about what is best for the budget of a large
# model (arXiv:2203.15556), and at fewer and more.
_FORECAST_MODELS = ("gemma3-nano", "gemma3-19.3m", "gemma3-45.6m", "gemma3-270m", "gemma3-1b")
_TOKENS_PER_PARAMETER = (2, 20, 100)


class Section(NamedTuple):
    """A table with its heading and sentences below it."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str]


def show_ladder(runs: Sequence[LadderRun], console: Console) -> None:
    """Prints the sections; `runs` are those of one ladder."""
    for section in sections(runs):
        console.print()
        if section.rows:
            table = Table(*section.heads, title=section.title, title_justify="left")
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        else:
            console.print(section.title)
        for note in section.notes:
            console.print(note)


def write_ladder_page(runs: Sequence[LadderRun], path: Path) -> None:
    """Writes the sections and charts as one page; raises a UserError if it cannot be written."""
    rungs = rungs_of(runs)
    charts = [
        _chart("Bits per byte", "by training tokens", _by_size(rungs)),
        _chart(
            "What other learning rates cost",
            "bits per byte above the best of the rung",
            _by_rung(rungs),
        ),
    ]
    tiles = [
        ("trainings", f"{len(runs)}"),
        ("text", runs[-1].text),
        ("vocabulary", f"{runs[-1].vocab_size:,}"),
        ("hours of training", f"{sum(run.wall_seconds for run in runs) / 3600:.1f}"),
        ("on", runs[-1].hardware),
    ]
    page = fill_page(
        "ladder.html",
        title=f"ladder on {runs[-1].text}",
        tiles=tiles,
        charts=[chart for chart in charts if chart["series"]],
        sections=list(sections(runs)),
    )
    write_text(path, page)


def sections(runs: Sequence[LadderRun]) -> Iterator[Section]:
    """Yields what there is to say: rungs, forecast, learning rates."""
    rungs = rungs_of(runs)
    law = fit_law(rungs)
    yield _rungs(rungs, law)
    yield _forecast(rungs, law)
    yield _rates(rungs)


def _rungs(rungs: Sequence[Rung], law: Law | None) -> Section:
    rows = []
    for rung in rungs:
        best = min(rung.runs, key=lambda run: run.reached)
        size = rung.num_layer_parameters
        fitted = "" if law is None else f"{law.forecast(size, rung.tokens).bpb:.3f}"
        rates = [f"{rate:.2g}" for rate in sorted(run.learning_rate for run in rung.runs)]
        found = (f"{best.learning_rate:.2g} of {', '.join(rates)}", f"{rung.best:.3f}", fitted)
        rows.append((best.model, f"{size:,}", f"{rung.tokens:,}", *found))
    heads = "size", "parameters in layers", "tokens", "best learning rate", "bits per byte", "law"
    return Section("Rungs", heads, rows, [])


def _forecast(rungs: Sequence[Rung], law: Law | None) -> Section:
    title = "Forecast of bits per byte"
    if law is None:
        few = f"At least {FEWEST_RUNGS} rungs of two sizes and two lengths are needed."
        return Section(title, (), [], [few])
    rows = []
    for model in _FORECAST_MODELS:
        size = preset(model, 1).num_layer_parameters()
        cells = [f"{law.forecast(size, ratio * size)}" for ratio in _TOKENS_PER_PARAMETER]
        rows.append((model, f"{size:,}", *cells))
    heads = (
        *("size", "parameters in layers"),
        *(f"{ratio} tokens for each" for ratio in _TOKENS_PER_PARAMETER),
    )
    notes = [f"{law}", f"95 % intervals. Beyond {extent(rungs)} all of it is extrapolated."]
    if check := check_law(rungs):
        verdict = "within it" if check.holds else "NOT within it"
        notes.append(
            f"Checked: without the largest size the law says {check.forecast} for its longest "
            f"training; it reached {check.found:.3f}, {verdict}."
        )
    notes.append("For this text, vocabulary and recipe; others have other bits per byte.")
    return Section(title, heads, rows, notes)


def _rates(rungs: Sequence[Rung]) -> Section:
    title = "Learning rates"
    found = [(rung, best) for rung in rungs if (best := rung.optimum()) is not None]
    rows = [
        (
            rung.runs[0].model,
            f"{rung.tokens:,}",
            f"{best.learning_rate:.2g}",
            f"{best.bpb:.3f}",
        )
        for rung, best in found
    ]
    law = fit_rates(rungs)
    few = "For a law, several rates are needed at two sizes and two lengths or more."
    notes = [few if law is None else f"{law}."]
    if check := check_rates(rungs):
        notes.append(
            f"Checked: without {check.rung.runs[0].model} on {check.rung.tokens:,} tokens the law "
            f"says {check.predicted:.2g} for it; its optimum is {check.found:.2g}, and the "
            f"difference costs {check.lost_bpb:.4f} bits per byte."
        )
    return Section(title, ("size", "tokens", "optimum", "bits per byte there"), rows, notes)


def _by_size(rungs: Sequence[Rung]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for rung in rungs:
        lines.setdefault(rung.runs[0].model, []).append((rung.tokens, rung.best))
    return lines


def _by_rung(rungs: Sequence[Rung]) -> dict[str, list[tuple[float, float]]]:
    return {
        f"{rung.runs[0].model}, {rung.tokens / 1e6:.2g}M": sorted(
            (run.learning_rate, run.bpb - rung.best) for run in rung.runs if run.bpb is not None
        )
        for rung in rungs
        if len(rung.runs) > 1
    }


def _chart(title: str, unit: str, lines: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    series = [
        {
            "run": name,
            "color": color,
            "kind": "points",
            "x": [x for x, _ in points],
            "y": [round(y, 4) for _, y in points],
        }
        for color, (name, points) in enumerate(lines.items())
    ]
    kind = {"kind": "lines", "scale": "logarithmic", "several": True}
    return {**kind, "title": title, "unit": unit, "series": series}
