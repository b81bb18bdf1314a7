"""kiem look: what is in a chunk directory, in the terminal and on a page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kiem.config import LookOptions
from kiem.core.console import printable
from kiem.core.files import check_new_file, write_text
from kiem.data.chunks import read_manifest
from kiem.look.survey import Section, survey
from kiem.report.page import fill_page

# In the terminal; the page has more.
_BAR_WIDTH = 12
_NAME_WIDTH = 40
_MOST_ROWS = 12
_MOST_TEXTS = 12
_MOST_CHARACTERS = 200


def look(options: LookOptions, console: Console) -> None:
    """Runs kiem look.

    Args:
        options: all options of kiem look.
        console: where the sections go.

    Raises:
        UserError: there is no such chunk directory, it is damaged, or the page cannot be written.
    """
    directory = options.directory
    read_manifest(directory)  # before the page is tried beside something else
    name = directory.resolve().name
    output = options.output or directory.resolve().with_name(f"{name}.html")
    check_new_file(output)
    sections = survey(directory, options.samples, options.seed)
    for section in sections:
        print_section(section, console)
    write_text(output, render(name, sections))
    console.print(f"\n{output}")


def render(title: str, sections: list[Section]) -> str:
    """Returns the page as HTML."""
    shown = [_without_controls(section) for section in sections]
    charts = [_chart(section) for section in shown]
    return fill_page("look.html", title=title, sections=shown, charts=charts)


def _chart(section: Section) -> dict[str, Any] | None:
    """Returns the bars of a section for page.js; None if it has none."""
    if not section.chart:
        return None
    groups = [row[0] for row in section.rows]
    nothing = [None] * len(groups)
    values = [float(f"{value:.4g}") for value in section.chart]
    series = [{"run": "", "color": 0, "value": values, "low": nothing, "high": nothing}]
    return {
        "kind": "bars",
        "title": section.title,
        "unit": section.unit,
        "groups": groups,
        "series": series,
    }


def _without_controls(section: Section) -> Section:
    """Returns a section whose texts can stand on a page."""
    rows = [tuple(map(printable, row)) for row in section.rows]
    texts = [(printable(label), printable(text)) for label, text in section.texts]
    return replace(section, rows=rows, texts=texts)


def print_section(section: Section, console: Console) -> None:
    """Prints a section; its name column gets what a narrow terminal leaves."""
    console.print(f"\n{section.title}", style="bold")
    for note in section.notes:
        console.print(note, style="dim")
    if section.rows:
        console.print(_table(section))
    if len(section.rows) > _MOST_ROWS:
        console.print(f"and {len(section.rows) - _MOST_ROWS} more on the page", style="dim")
    for label, text in section.texts[:_MOST_TEXTS]:
        console.print(label, style="dim")
        console.print(f"  {' '.join(text.split())[:_MOST_CHARACTERS]}")
    if len(section.texts) > _MOST_TEXTS:
        console.print(f"and {len(section.texts) - _MOST_TEXTS} more on the page", style="dim")


def _table(section: Section) -> Table:
    heads = section.heads or [""] * len(section.rows[0])
    table = Table(box=None, show_header=bool(section.heads), pad_edge=False)
    table.add_column(heads[0], max_width=_NAME_WIDTH)  # the only one that a narrow terminal cuts
    for head in heads[1:]:
        table.add_column(head, justify="right" if section.heads else "left", no_wrap=True)
    if section.chart:
        table.add_column("", no_wrap=True)
    highest = max(section.chart, default=0) or 1
    for place, row in enumerate(section.rows[:_MOST_ROWS]):
        share = section.chart[place] / highest if section.chart else 0
        name = Text(row[0], no_wrap=True, overflow="ellipsis")
        table.add_row(name, *row[1:], *(["█" * round(_BAR_WIDTH * share)] if section.chart else []))
    return table
