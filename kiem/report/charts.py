"""Charts of a report as plain data; page.js hands them to Chart.js."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from kiem.report.record import Figures, Line, Record

# A phone shows 400 points side by side and a wide screen 1200; each stretch has two, and a mean.
_MOST_STRETCHES = 250
_Points = dict[str, list[float]]


class _Curve(NamedTuple):
    """A figure over the steps: what it is called in lines of updates and of evaluations."""

    title: str
    unit: str
    training: str | None = None
    test: str | None = None
    factor: float = 1.0


_CURVES = (
    _Curve("Loss", "nats per token", training="loss", test="test_loss"),
    _Curve("Bits per byte", "bits per byte of test text", test="test_bpb"),
    _Curve("Learning rate", "", training="learning_rate"),
    _Curve("Gradient norm", "before clipping", training="grad_norm"),
    _Curve("Speed", "tokens per second", training="tokens_per_second"),
    _Curve("MFU", "% of the device's matrix peak", training="mfu", factor=100),
    _Curve("Memory", "GB at the peak", training="memory_bytes", factor=1e-9),
)


def curves(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns a line chart for every figure that at least one of the runs has."""
    charts = []
    for curve in _CURVES:
        series: list[dict[str, Any]] = []
        for color, record in enumerate(records):
            names = (curve.training, curve.test)
            lines = line_series(record.updates, record.evaluations, *names, curve.factor)
            series += [{"run": record.name, "color": color, **line} for line in lines]
        if series:
            title = {"title": curve.title, "unit": curve.unit}
            charts.append({"kind": "lines", **title, "series": series})
    return charts


def line_series(
    updates: Sequence[Line],
    evaluations: Sequence[Line],
    training: str | None,
    test: str | None,
    factor: float = 1,
) -> list[dict[str, Any]]:
    """Returns the lines of a figure in a chart, as far as it is known.

    Args:
        updates, evaluations: of a run.
        training, test: what the figure is called in them.
        factor: from the figure to the unit.
    """
    lines = []
    if training is not None:
        lines += _training_lines(_points(updates, training, factor))
    if test is not None:
        points = _points(evaluations, test, factor)
        lines += [{"kind": "test", **points}] if points["y"] else []
    return lines


def bars(
    names: Sequence[str],
    tables: Sequence[dict[str, Figures]],
    key: str,
    title: str,
    unit: str,
    factor: float = 1,
) -> dict[str, Any] | None:
    """Returns the bars of one figure with its interval, if it has one; None without any figure.

    Args:
        names: of the runs.
        tables: for each run, its groups and their figures.
        key: of the figure; `key`_low and `key`_high are the ends of its interval.
        title, unit: shown in the chart.
        factor: from the figure to the unit.
    """
    highest: dict[str, float] = {}
    for table in tables:
        for group, figures in table.items():
            highest[group] = max(figures.get(key, 0), highest.get(group, 0))
    if not highest:
        return None
    groups = sorted(highest, key=lambda group: (-highest[group], group))
    series = []
    for color, (name, table) in enumerate(zip(names, tables, strict=True)):
        row: dict[str, Any] = {"run": name, "color": color}
        for end, figure in (("value", key), ("low", f"{key}_low"), ("high", f"{key}_high")):
            values = [table.get(group, {}).get(figure) for group in groups]
            row[end] = [None if value is None else _short(value * factor) for value in values]
        if table:
            series.append(row)
    return {"kind": "bars", "title": title, "unit": unit, "groups": groups, "series": series}


def _training_lines(points: _Points) -> list[dict[str, Any]]:
    """Returns the line of every update; of many the extremes and the mean of each stretch."""
    y = points["y"]
    if not y:
        return []
    if len(y) <= 2 * _MOST_STRETCHES:
        return [{"kind": "training", **points}]
    edges = [len(y) * number // _MOST_STRETCHES for number in range(_MOST_STRETCHES + 1)]
    extremes: list[int] = []
    means: _Points = {name: [] for name in points}
    for first, end in pairwise(edges):
        places = range(first, end)
        extremes += sorted({min(places, key=y.__getitem__), max(places, key=y.__getitem__)})
        for name, values in points.items():
            means[name].append(_short(sum(values[first:end]) / (end - first)))
    noise = {name: [values[place] for place in extremes] for name, values in points.items()}
    return [{"kind": "noise", **noise}, {"kind": "training", **means}]


def _points(lines: Sequence[Line], name: str, factor: float) -> _Points:
    """Returns a figure with its places on the three axes, where it is known."""
    known = [line for line in lines if getattr(line, name) is not None]
    return {
        "step": [line.step for line in known],
        "tokens": [line.tokens for line in known],
        "minutes": [_short(line.seconds / 60) for line in known],
        "y": [_short(getattr(line, name) * factor) for line in known],
    }


def _short(value: float) -> float:
    """Drops digits that no screen shows; they would be most of the page."""
    return float(f"{value:.5g}")
