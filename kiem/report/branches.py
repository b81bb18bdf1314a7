"""What branches make otherwise than the runs that they began with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from kiem.report.charts import line_series
from kiem.report.record import Line, Record


def branches(records: Sequence[Record]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields a sentence and the charts of each branch whose parent is among the runs."""
    by_name = {record.name: record for record in records}
    for color, record in enumerate(records):
        branch = record.branched_from
        parent = by_name.get(branch.run) if branch is not None else None
        if branch is None or parent is None or parent is record:
            continue
        updates = _less(record.updates, parent.updates, "loss", branch.step)
        tests = _less(record.evaluations, parent.evaluations, "test_loss", branch.step)
        series = line_series(updates, tests, "loss", "test_loss")
        chart = {
            "kind": "lines",
            "title": f"Loss of {record.name} less that of {parent.name}",
            "unit": "nats per token",
            "series": [{"run": record.name, "color": color, **line} for line in series],
        }
        text = f"{record.name} is a branch of {parent.name} after step {branch.step:,}."
        yield text + _verdict(record, parent, branch.step), [chart] if series else []


def _verdict(record: Record, parent: Record, step: int) -> str:
    """Returns a sentence about the last evaluation that both runs have."""
    ours = {line.step: line.test_bpb for line in record.evaluations if line.step > step}
    theirs = {line.step: line.test_bpb for line in parent.evaluations}
    common = [at for at in ours if theirs.get(at) is not None]
    if not common:
        return ""
    own, other = ours[common[-1]], theirs[common[-1]]
    assert own is not None and other is not None
    verdict = "better" if own < other else "worse"
    return (
        f" After step {common[-1]:,} it has {own:.4f} bits per byte, {abs(own - other):.4f} "
        f"{verdict if own != other else 'from it'}."
    )


def _less(lines: Sequence[Line], others: Sequence[Line], name: str, step: int) -> list[Line]:
    """Returns lines after a step, with a figure less that of the same step among others."""
    of_others = {line.step: getattr(line, name) for line in others}
    found = []
    for line in lines:
        own, other = getattr(line, name), of_others.get(line.step)
        if line.step > step and own is not None and other is not None:
            found.append(replace(line, **{name: own - other}))
    return found
