"""The charts of a report as plain data; page.js hands them to Chart.js."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kiem.report.record import Record

# A phone shows 400 points side by side and a wide screen 1200; four numbers for each are enough.
_MOST_POINTS = 600
_MOST_MEANS = 120
_MOST_BARS = 100


@dataclass(frozen=True)
class _Curve:
    """A figure of metrics.jsonl that is drawn over the steps.

    Attributes:
        title, unit: as people read them.
        training, test: its key in the lines of updates and of evaluations, if it is there.
        factor: from the figure to the unit.
    """

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
        series = []
        for color, record in enumerate(records):
            if curve.training is not None:
                series += _training_series(record, curve, color)
            if curve.test is not None:
                points = _points(record.evaluations, curve.test, curve.factor)
                if points:
                    whole = {name: list(values) for name, values in points.items()}
                    series.append({"kind": "test", "run": record.name, "color": color, **whole})
        if series:
            title = {"title": curve.title, "unit": curve.unit}
            charts.append({"kind": "lines", **title, "series": series})
    return charts


def per_source_bars(records: Sequence[Record]) -> dict[str, Any] | None:
    """Returns the bar chart of bits per byte by source, or None when no run has them."""
    tables = [record.facts.get("per_source", {}) for record in records]
    return _bars(records, tables, "bpb", "Bits per byte by source", "bits per byte", 1)


def minimal_pair_bars(records: Sequence[Record]) -> dict[str, Any] | None:
    """Returns the bar chart of accuracy by phenomenon, or None when no run has it."""
    tables = [record.facts.get("minimal_pairs", {}).get("phenomena", {}) for record in records]
    title = "Minimal pairs by phenomenon"
    return _bars(records, tables, "accuracy", title, "% chosen rightly", 100)


def text_bars(records: Sequence[Record]) -> dict[str, Any] | None:
    """Returns the bar chart of megabytes of training text by source, or None."""
    series = []
    for color, record in enumerate(records):
        by_source = record.facts.get("data", {}).get("bytes_per_source", {})
        if by_source:
            figures = {name: {"value": num / 1e6} for name, num in by_source.items()}
            series.append((color, record.name, figures))
    return _bar_chart(series, "Training text by source", "MB")


def thin(y: Sequence[float], most: int) -> list[int]:
    """Chooses at most `most` places of a curve that keep its shape: both extremes of each stretch.

    Args:
        y: the curve.
        most: places to keep, at least 4.

    Returns:
        The places, in order; all of them when they are few enough.
    """
    if len(y) <= most:
        return list(range(len(y)))
    num_stretches = most // 2 - 1
    kept = {0, len(y) - 1}
    for stretch in _stretches(len(y), num_stretches):
        kept.add(min(stretch, key=lambda place: y[place]))
        kept.add(max(stretch, key=lambda place: y[place]))
    return sorted(kept)


def _training_series(record: Record, curve: _Curve, color: int) -> list[dict[str, Any]]:
    """Returns a figure of every update, and its mean over stretches when there are many updates."""
    assert curve.training is not None
    points = _points(record.updates, curve.training, curve.factor)
    if not points:
        return []
    places = thin(points["y"], _MOST_POINTS)
    thinned = {name: [values[place] for place in places] for name, values in points.items()}
    common = {"run": record.name, "color": color}
    if len(points["y"]) <= 2 * _MOST_MEANS:
        return [{"kind": "training", **common, **thinned}]
    means: dict[str, list[float]] = {name: [] for name in points}
    for stretch in _stretches(len(points["y"]), _MOST_MEANS):
        for name, values in points.items():
            mean = sum(values[place] for place in stretch) / len(stretch)
            means[name].append(_short(mean))
    return [{"kind": "noise", **common, **thinned}, {"kind": "training", **common, **means}]


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
    return found if found["y"] else {}


def _stretches(num: int, num_stretches: int) -> list[range]:
    edges = [round(index * num / num_stretches) for index in range(num_stretches + 1)]
    return [range(a, b) for a, b in pairwise(edges) if a < b]


def _bars(
    records: Sequence[Record],
    tables: Sequence[dict[str, dict[str, float]]],
    key: str,
    title: str,
    unit: str,
    factor: float,
) -> dict[str, Any] | None:
    """Returns the bars of one figure with its interval, `key`_low to `key`_high where it has one.

    Args:
        records: the runs.
        tables: for each run, its groups and their figures.
        key: of the figure.
        title, unit: as people read them.
        factor: from the figure to the unit.
    """
    ends = {"value": key, "low": f"{key}_low", "high": f"{key}_high"}
    series = []
    for color, (record, table) in enumerate(zip(records, tables, strict=True)):
        figures = {
            group: {end: entry[name] * factor for end, name in ends.items() if name in entry}
            for group, entry in table.items()
        }
        if figures:
            series.append((color, record.name, figures))
    return _bar_chart(series, title, unit)


def _bar_chart(
    series: list[tuple[int, str, dict[str, dict[str, float]]]], title: str, unit: str
) -> dict[str, Any] | None:
    if not series:
        return None
    groups = sorted({group for _, _, figures in series for group in figures})
    groups.sort(key=lambda group: -max(f[group]["value"] for *_, f in series if group in f))
    if len(groups) > _MOST_BARS:
        title += f" (the {_MOST_BARS} largest of {len(groups):,})"
        del groups[_MOST_BARS:]
    rows = [
        {
            "run": name,
            "color": color,
            **{
                end: [_rounded(figures.get(group, {}).get(end)) for group in groups]
                for end in ("value", "low", "high")
            },
        }
        for color, name, figures in series
    ]
    return {"kind": "bars", "title": title, "unit": unit, "groups": groups, "series": rows}


def _rounded(value: float | None) -> float | None:
    return None if value is None else _short(value)


def _short(value: float) -> float:
    """Drops digits that no screen shows; they would be most of the page."""
    return float(f"{value:.5g}")
