"""Charts of a report as plain data; page.js hands them to Chart.js."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from kiem.report.record import Record

# A phone shows 400 points side by side and a wide screen 1200; four numbers for each are enough.
_MOST_POINTS = 600
_MOST_MEANS = 120
_MOST_BARS = 100


class _Curve(NamedTuple):
    """A figure over the steps: its keys in the lines of updates and of evaluations."""

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
            run = {"run": record.name, "color": color}
            if curve.training is not None:
                points = _points(record.updates, curve.training, curve.factor)
                series += [{**run, **line} for line in _training_lines(points)]
            if curve.test is not None:
                points = _points(record.evaluations, curve.test, curve.factor)
                if points["y"]:
                    series.append(
                        {**run, "kind": "test", **_select(points, range(len(points["y"])))}
                    )
        if series:
            title = {"title": curve.title, "unit": curve.unit}
            charts.append({"kind": "lines", **title, "series": series})
    return charts


def per_source_bars(records: Sequence[Record]) -> dict[str, Any] | None:
    """Returns the bar chart of bits per byte by source, or None when no run has them."""
    tables = [record.metadata.get("per_source", {}) for record in records]
    return _bars(records, tables, "bpb", "Bits per byte by source", "bits per byte")


def minimal_pair_bars(records: Sequence[Record]) -> dict[str, Any] | None:
    """Returns the bar chart of accuracy by phenomenon, or None when no run has it."""
    tables = [record.metadata.get("minimal_pairs", {}).get("phenomena", {}) for record in records]
    title = "Minimal pairs by phenomenon"
    return _bars(records, tables, "accuracy", title, "% chosen rightly", 100)


def text_bars(records: Sequence[Record]) -> dict[str, Any] | None:
    """Returns the bar chart of megabytes of training text by source, or None."""
    tables = [
        {name: {"bytes": num_bytes} for name, num_bytes in by_source.items()}
        for record in records
        for by_source in [record.metadata.get("data", {}).get("bytes_per_source", {})]
    ]
    return _bars(records, tables, "bytes", "Training text by source", "MB", 1e-6)


def thin(y: Sequence[float], most: int) -> list[int]:
    """Returns at most `most` places of a curve, in order, with both extremes of each stretch.

    Args:
        y: the curve.
        most: places to keep, at least 4.
    """
    if len(y) <= most:
        return list(range(len(y)))
    kept = {0, len(y) - 1}
    for stretch in _stretches(len(y), most // 2 - 1):
        kept.add(min(stretch, key=lambda place: y[place]))
        kept.add(max(stretch, key=lambda place: y[place]))
    return sorted(kept)


def _training_lines(points: dict[str, array[Any]]) -> list[dict[str, Any]]:
    """Returns the line of every update, and of means over stretches if there are many updates."""
    num_points = len(points["y"])
    if num_points == 0:
        return []
    thinned = _select(points, thin(points["y"], _MOST_POINTS))
    if num_points <= 2 * _MOST_MEANS:
        return [{"kind": "training", **thinned}]
    stretches = _stretches(num_points, _MOST_MEANS)
    means = {
        name: [_short(sum(values[s.start : s.stop]) / len(s)) for s in stretches]
        for name, values in points.items()
    }
    return [{"kind": "noise", **thinned}, {"kind": "training", **means}]


def _points(lines: Sequence[dict[str, Any]], key: str, factor: float) -> dict[str, array[Any]]:
    """Returns a figure with its places on the three axes, where it is finite."""
    kinds = {"step": "q", "tokens": "q", "minutes": "d", "y": "d"}
    found: dict[str, array[Any]] = {name: array(kind) for name, kind in kinds.items()}
    for line in lines:
        value = line.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            found["step"].append(line["step"])
            found["tokens"].append(line.get("tokens", 0))
            found["minutes"].append(_short(line.get("seconds", 0.0) / 60))
            found["y"].append(_short(value * factor))
    return found


def _select(points: dict[str, array[Any]], places: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [values[place] for place in places] for name, values in points.items()}


def _stretches(num: int, num_stretches: int) -> list[range]:
    edges = [round(index * num / num_stretches) for index in range(num_stretches + 1)]
    return [range(a, b) for a, b in pairwise(edges) if a < b]


def _bars(
    records: Sequence[Record],
    tables: Sequence[dict[str, dict[str, float]]],
    key: str,
    title: str,
    unit: str,
    factor: float = 1,
) -> dict[str, Any] | None:
    """Returns the bars of one figure with its interval, `key`_low to `key`_high, if it has one.

    Args:
        records: the runs.
        tables: for each run, its groups and their figures.
        key: of the figure.
        title, unit: shown in the chart.
        factor: from the figure to the unit.
    """
    groups = sorted({group for table in tables for group in table})
    if not groups:
        return None
    groups.sort(key=lambda group: -max(table[group][key] for table in tables if group in table))
    if len(groups) > _MOST_BARS:
        title += f" (the {_MOST_BARS} largest of {len(groups):,})"
        del groups[_MOST_BARS:]
    series: list[dict[str, Any]] = []
    for color, (record, table) in enumerate(zip(records, tables, strict=True)):
        row: dict[str, Any] = {"run": record.name, "color": color}
        for end, name in (("value", key), ("low", f"{key}_low"), ("high", f"{key}_high")):
            figures = [table.get(group, {}).get(name) for group in groups]
            row[end] = [None if figure is None else _short(figure * factor) for figure in figures]
        if table:
            series.append(row)
    return {"kind": "bars", "title": title, "unit": unit, "groups": groups, "series": series}


def _short(value: float) -> float:
    """Drops digits that no screen shows; they would be most of the page."""
    return float(f"{value:.5g}")
