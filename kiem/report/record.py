"""What a run directory says about its run, however far it came and whatever a kill left of it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kiem.core.errors import ExitCode, UserError
from kiem.core.json_input import parse_json
from kiem.report.shapes import Line, check

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
FACTS_FILE = "run.json"
SUMMARY_FILE = "training_summary.json"
EVALUATION_FILE = "evaluation.json"
_EVALUATED = ("per_source", "minimal_pairs")
_UPDATE_KEYS = {"loss", "tokens", "seconds"}
_TEST_KEYS = {"test_loss", "test_bpb"}
_INTEGERS = ("step", "tokens", "memory_bytes")


class Updates(Sequence[dict[str, Any]]):
    """Lines of updates, held as columns of numbers.

    Training draws its report again and again; as dicts, a long log would take more memory than a
    small model (1.6 kB a line, against 8 bytes a figure).
    """

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._num = 0

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line; what of it is no number is not kept."""
        for name, value in line.items():
            if isinstance(value, int | float):
                if name not in self._columns:
                    self._columns[name] = array("d", [math.nan]) * self._num
                self._columns[name].append(value)
        self._num += 1
        for column in self._columns.values():
            if len(column) < self._num:
                column.append(math.nan)

    def pop(self) -> None:
        """Drops the last line."""
        self._num -= 1
        for column in self._columns.values():
            column.pop()

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: Any) -> Any:
        place = range(self._num)[index]
        figures = {name: column[place] for name, column in self._columns.items()}
        return {
            name: int(value) if name in _INTEGERS else value
            for name, value in figures.items()
            if not math.isnan(value)
        }


@dataclass(frozen=True)
class Record:
    """A run as its files tell it.

    Attributes:
        name: of the run directory.
        options: config.yaml.
        facts: training_summary.json of a finished run, else run.json, which has no results yet; and
            bits per byte by source and minimal pairs of an evaluation.json, as evaluate.py --json
            writes it, in the run directory.
        updates: lines of metrics.jsonl with a training loss, in the order of their steps.
        evaluations: those with a test loss, with the `tokens` and `seconds` of their update.
        warnings: those with a warning.
        num_damaged: lines that could not be read.
    """

    name: str
    options: dict[str, Any]
    facts: dict[str, Any]
    updates: Sequence[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    num_damaged: int

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return "finished" in self.facts


def read_record(directory: Path) -> Record:
    """Reads a run directory.

    Raises:
        UserError: it is no run directory.
    """
    path = directory / METRICS_FILE
    if not path.is_file():
        raise UserError(
            f"not a run directory: no {METRICS_FILE}",
            where=str(directory),
            fix="Name a folder that training.py made, such as trained_models/gemma3-1b-dutch-...",
            exit_code=ExitCode.NOT_FOUND,
        )
    updates, others = Updates(), list[dict[str, Any]]()
    num_damaged = _read_lines(path, updates, others)
    evaluations = [line for line in others if line.keys() >= _TEST_KEYS]
    summary = _mapping(directory / "final_model" / SUMMARY_FILE)
    evaluation = _mapping(directory / EVALUATION_FILE)
    measured = {name: evaluation[name] for name in _EVALUATED if name in evaluation}
    return Record(
        name=directory.resolve().name,
        options=_mapping(directory / CONFIG_FILE),
        facts={**(summary or _mapping(directory / FACTS_FILE)), **measured},
        updates=updates,
        evaluations=_with_progress(evaluations, updates),
        warnings=[line for line in others if "warning" in line],
        num_damaged=num_damaged,
    )


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines of metrics.jsonl, and how many could not be read.

    What a run did again after it was resumed replaces what it did before.

    Raises:
        UserError: the file cannot be read.
    """
    kept: list[dict[str, Any]] = []
    return kept, _read_lines(path, kept, kept)


def _read_lines(
    path: Path, updates: Updates | list[dict[str, Any]], others: list[dict[str, Any]]
) -> int:
    """Adds the lines of metrics.jsonl to `updates` or `others`; returns how many are damaged."""
    num_damaged = last = 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})",
            where=str(path),
            fix="Make the file readable, or take it out of the run directory.",
            exit_code=ExitCode.BAD_INPUT,
        ) from error
    with file:
        for text in file:
            try:
                line = parse_json(text)
                step = msgspec.convert(line, Line).step
            except ValueError:
                num_damaged += 1
                continue
            if step < last:
                for lines in (updates, others):
                    while lines and lines[-1]["step"] >= step:
                        lines.pop()
            (updates if line.keys() >= _UPDATE_KEYS else others).append(line)
            last = step
    return num_damaged


def _with_progress(
    evaluations: list[dict[str, Any]], updates: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Gives evaluations the tokens and seconds of the last update before them."""
    found: list[dict[str, Any]] = []
    index = 0
    for evaluation in evaluations:
        while index + 1 < len(updates) and updates[index + 1]["step"] <= evaluation["step"]:
            index += 1
        update: dict[str, Any] = updates[index] if updates else {}
        place = {name: update[name] for name in ("tokens", "seconds") if name in update}
        found.append(place | evaluation)
    return found


def _mapping(path: Path) -> dict[str, Any]:
    """Returns what a YAML or JSON file holds by name; nothing when it is not there.

    Raises:
        UserError: it is damaged.
    """
    fix = "Remove the file: the report then does without it."
    try:
        data = path.read_bytes()
        values = parse_json(data) if path.suffix == ".json" else yaml.safe_load(data) or {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        what = f"cannot be read ({error})"
        raise UserError(what, where=str(path), fix=fix, exit_code=ExitCode.DAMAGED) from error
    return check(values, path, fix)
