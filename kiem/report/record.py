"""Reader for run directories, whether the run is finished, running or was killed.

People and other programs write to these files as well: they copy lines, add evaluations, cut logs.
So the types and ranges of what the report shows are checked here.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from kiem.core.errors import ExitCode, bad_input, damaged, not_found
from kiem.core.json_input import convert, parse_json

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
METADATA_FILE = "run.json"
SUMMARY_FILE = "training_summary.json"
EVALUATION_FILE = "evaluation.json"
_UPDATE_KEYS = {"loss", "tokens", "seconds"}
_TEST_KEYS = {"test_loss", "test_bpb"}
_INTEGERS = ("step", "tokens", "memory_bytes")
_FLOATS = ("seconds", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
# Finite: neither JSON nor a chart has others.
_Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Sample(msgspec.Struct):
    prompt: str
    text: str


class _Line(msgspec.Struct):
    """A line of metrics.jsonl; a line of another kind counts as damaged."""

    step: _Count
    tokens: _Count = 0
    seconds: _Amount = 0.0
    loss: _Number = 0.0
    learning_rate: _Number = 0.0
    grad_norm: _Number = 0.0
    tokens_per_second: _Number = 0.0
    mfu: _Number = 0.0
    memory_bytes: _Count = 0
    test_loss: _Number = 0.0
    test_bpb: _Number = 0.0
    samples: list[_Sample] = []
    warning: str = ""


class _Options(msgspec.Struct):
    """What is used of config.yaml; the rest is shown as it is."""

    price: _Amount | None = None


class _Bits(msgspec.Struct):
    bpb: _Number
    bpb_low: _Number = 0.0
    bpb_high: _Number = 0.0


class _Accuracy(msgspec.Struct):
    accuracy: _Number
    accuracy_low: _Number = 0.0
    accuracy_high: _Number = 0.0


class _Pairs(_Accuracy):
    phenomena: dict[str, _Accuracy] = {}


class _Evaluation(msgspec.Struct, kw_only=True):
    """evaluation.json, as evaluate.py --json writes it; also a part of a summary."""

    per_source: dict[str, _Bits] = {}
    minimal_pairs: _Pairs | msgspec.UnsetType = msgspec.UNSET


class _DataOptions(msgspec.Struct):
    chunk_size: _Count


class _Source(msgspec.Struct):
    kind: str
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None


class _Data(msgspec.Struct):
    options: _DataOptions
    source: _Source
    train_documents: _Count
    train_tokens: _Count
    test_documents: _Count
    manifest_sha256: str
    bytes_per_source: dict[str, _Count] = {}


class _Tokenizer(msgspec.Struct):
    origin: str
    num_rows: _Count
    sha256: str
    num_unused_rows: _Count = 0


class _Recipe(msgspec.Struct):
    batch_size: _Count
    accumulation: _Count
    chunks_per_step: _Count
    learning_rate: _Number
    max_steps: _Count | None = None


class _Hardware(msgspec.Struct):
    devices: _Count
    device: str
    precision: str


class _Metadata(_Evaluation, kw_only=True):
    """run.json, and training_summary.json, which has the results as well."""

    model: str
    parameters: _Count
    initialized_from: str
    data: _Data
    tokenizer: _Tokenizer
    recipe: _Recipe
    hardware: _Hardware
    versions: dict[str, str]
    finished: str = ""


class Updates(Sequence[dict[str, Any]]):
    """Lines of updates, in columns of numbers.

    Training draws its report again and again; as dicts, a long log would take more memory than a
    small model (1.6 kB a line, against 8 bytes a figure).
    """

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in (*_INTEGERS, *_FLOATS)}

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line."""
        for name, column in self._columns.items():
            column.append(line.get(name, math.nan))

    def pop(self) -> None:
        """Drops the last line."""
        for column in self._columns.values():
            column.pop()

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __getitem__(self, index: Any) -> Any:
        figures = {name: column[index] for name, column in self._columns.items()}
        return {
            name: int(value) if name in _INTEGERS else value
            for name, value in figures.items()
            if not math.isnan(value)
        }


@dataclass(frozen=True)
class Record:
    """A run according to its files.

    Attributes:
        name: of the run directory.
        options: config.yaml.
        metadata: training_summary.json of a finished run, else run.json, which has no results; with
            bits per byte by source and minimal pairs of an evaluation.json in the run directory.
        updates: lines of metrics.jsonl with a training loss, in the order of their steps.
        evaluations: those with a test loss, with the `tokens` and `seconds` of their update.
        warnings: those with a warning.
        num_damaged: lines that could not be read.
    """

    name: str
    options: dict[str, Any]
    metadata: dict[str, Any]
    updates: Sequence[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    num_damaged: int


def read_record(directory: Path) -> Record:
    """Reads a run directory.

    Raises:
        UserError: it is no run directory, or a file is damaged.
    """
    path = directory / METRICS_FILE
    if not path.is_file():
        fix = "Name a folder that training.py made, such as trained_models/gemma3-1b-dutch-..."
        raise not_found(str(directory), f"not a run directory: no {METRICS_FILE}", fix)
    updates, others = Updates(), list[dict[str, Any]]()
    num_damaged = _read_lines(path, updates, others)
    metadata = _read_file(directory / "final_model" / SUMMARY_FILE, _Metadata)
    evaluation = _read_file(directory / EVALUATION_FILE, _Evaluation)
    measured = {key: evaluation[key] for key in _Evaluation.__struct_fields__ if key in evaluation}
    return Record(
        name=directory.resolve().name,
        options=_read_file(directory / CONFIG_FILE, _Options),
        metadata={**(metadata or _read_file(directory / METADATA_FILE, _Metadata)), **measured},
        updates=updates,
        evaluations=[_with_progress(line, updates) for line in others if line.keys() >= _TEST_KEYS],
        warnings=[line for line in others if "warning" in line],
        num_damaged=num_damaged,
    )


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the lines of metrics.jsonl, and how many could not be read.

    What a run did again after it was resumed replaces what it did before.

    Raises:
        UserError: the file cannot be read.
    """
    lines: list[dict[str, Any]] = []
    return lines, _read_lines(path, lines, lines)


def _read_lines(
    path: Path, updates: Updates | list[dict[str, Any]], others: list[dict[str, Any]]
) -> int:
    """Adds the lines of metrics.jsonl to `updates` or `others`; returns how many are damaged."""
    num_damaged = last = 0
    try:
        file = path.open("rb")
    except OSError as error:
        fix = "Make the file readable, or take it out of the run directory."
        raise bad_input(str(path), f"cannot be read ({error.strerror})", fix) from error
    with file:
        for text in file:
            try:
                line = parse_json(text)
                step = msgspec.convert(line, _Line).step
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


def _with_progress(evaluation: dict[str, Any], updates: Updates) -> dict[str, Any]:
    """Returns an evaluation with the tokens and seconds of the last update before it."""
    index = bisect_right(updates, evaluation["step"], key=lambda update: update["step"]) - 1
    update: dict[str, Any] = updates[max(0, index)] if updates else {}
    return {name: update[name] for name in ("tokens", "seconds") if name in update} | evaluation


def _read_file(path: Path, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Returns the content of a YAML or JSON file by name; nothing when it is not there.

    Raises:
        UserError: it is damaged, or not of that kind; names the key.
    """
    fix = "Remove the file: the report then does without it."
    try:
        data = path.read_bytes()
        values = parse_json(data) if path.suffix == ".json" else yaml.safe_load(data) or {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        raise damaged(str(path), f"cannot be read ({error})", fix) from error
    for expected in (dict[str, Any], kind):
        convert(values, expected, where=str(path), fix=fix, exit_code=ExitCode.DAMAGED)
    content: dict[str, Any] = values
    return content
