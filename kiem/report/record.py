"""Reader for run directories, whether the run is finished, running or was killed.

People and other programs write to these files as well: they copy lines, add evaluations, cut logs.
So the types and ranges of what the report shows are checked here.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

from kiem.core.errors import ExitCode, bad_input, damaged, not_found
from kiem.core.json_input import convert, parse_json, read_json

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
METADATA_FILE = "run.json"
SUMMARY_FILE = "training_summary.json"
EVALUATION_FILE = "evaluation.json"
_FIX = "Remove the file: the report then does without it."
# Finite: neither JSON nor a chart has others.
_Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
# A figure, such as "bpb", and the ends of its interval, "bpb_low" and "bpb_high".
Figures = dict[str, _Number]
Kind = TypeVar("Kind")


class Sample(msgspec.Struct):
    """What the model made of a prompt."""

    prompt: str
    text: str


class Line(msgspec.Struct, gc=False):
    """A line of metrics.jsonl; a line of another kind counts as damaged.

    A figure is None where the line does not have it: one of an update has a loss, one of an
    evaluation a test loss.
    """

    step: _Count
    tokens: _Count = 0
    seconds: _Amount = 0.0
    loss: _Number | None = None
    learning_rate: _Number | None = None
    grad_norm: _Number | None = None
    tokens_per_second: _Number | None = None
    mfu: _Number | None = None
    memory_bytes: _Count | None = None
    test_loss: _Number | None = None
    test_bpb: _Number | None = None
    samples: tuple[Sample, ...] = ()
    warning: str = ""


class Pairs(msgspec.Struct):
    """Minimal pairs: the accuracy over all, and the figures of each phenomenon."""

    accuracy: _Number
    phenomena: dict[str, Figures] = {}


class Results(msgspec.Struct):
    """evaluation.json, as evaluate.py --json writes it, or training_summary.json."""

    per_source: dict[str, Figures] = {}
    minimal_pairs: Pairs | None = None
    finished: str = ""


class Branch(msgspec.Struct):
    """The run that a branch began with, and after which of its steps."""

    run: str
    step: _Count


class _Metadata(msgspec.Struct):
    branched_from: Branch | None = None


class _Options(msgspec.Struct):
    price: _Amount | None = None


@dataclass(frozen=True)
class Record:
    """A run according to its files.

    Attributes:
        name: of the run directory.
        options, metadata: config.yaml and run.json, which are only shown.
        price: of an hour on the hardware, by the options.
        branched_from: of a branch.
        results: of evaluation.json in the run directory, else of the summary of a finished run.
        updates: lines of metrics.jsonl with a training loss, in the order of their steps.
        evaluations: those with a test loss, with the tokens and seconds of their update.
        warnings: those with a warning.
        num_damaged: lines that could not be read.
    """

    name: str
    options: dict[str, Any]
    metadata: dict[str, Any]
    price: float | None
    branched_from: Branch | None
    results: Results
    updates: list[Line]
    evaluations: list[Line]
    warnings: list[Line]
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
    lines, num_damaged = read_metrics(path, Line)
    updates, evaluations = list[Line](), list[Line]()
    for line in lines:
        if line.loss is not None:
            updates.append(line)
        elif line.test_loss is not None and line.test_bpb is not None:
            if updates:
                line.tokens, line.seconds = updates[-1].tokens, updates[-1].seconds
            evaluations.append(line)
    config = directory / CONFIG_FILE
    options = _read(config, dict[str, Any])
    checked = convert(options, _Options, where=str(config), fix=_FIX, exit_code=ExitCode.DAMAGED)
    file = directory / METADATA_FILE
    metadata = _read(file, dict[str, Any])
    known = convert(metadata, _Metadata, where=str(file), fix=_FIX, exit_code=ExitCode.DAMAGED)
    summary = _read(directory / "final_model" / SUMMARY_FILE, Results)
    evaluation = _read(directory / EVALUATION_FILE, Results)
    return Record(
        name=directory.resolve().name,
        options=options,
        metadata=metadata,
        price=checked.price,
        branched_from=known.branched_from,
        results=Results(
            evaluation.per_source or summary.per_source,
            evaluation.minimal_pairs or summary.minimal_pairs,
            summary.finished,
        ),
        updates=updates,
        evaluations=evaluations,
        warnings=[line for line in lines if line.warning],
        num_damaged=num_damaged,
    )


def read_metrics(path: Path, kind: type[Kind]) -> tuple[list[Kind], int]:
    """Returns the lines of metrics.jsonl, and how many could not be read.

    What a run did again after it was resumed replaces what it did before.

    Args:
        path: the file.
        kind: what to return lines as: `Line`, or dict[str, Any] with all that they say.

    Raises:
        UserError: the file cannot be read.
    """
    lines, steps, num_damaged = list[Kind](), list[int](), 0
    try:
        file = path.open("rb")
    except OSError as error:
        fix = "Make the file readable, or take it out of the run directory."
        raise bad_input(str(path), f"cannot be read ({error.strerror})", fix) from error
    with file:
        for text in file:
            try:
                value = parse_json(text)
                step = msgspec.convert(value, Line).step
            except ValueError:
                num_damaged += 1
                continue
            if steps and step < steps[-1]:
                first = bisect_left(steps, step)
                del steps[first:], lines[first:]
            steps.append(step)
            lines.append(msgspec.convert(value, kind))
    return lines, num_damaged


def _read(path: Path, kind: type[Kind]) -> Kind:
    """Returns what is used of a YAML or JSON file; nothing when it is not there.

    Raises:
        UserError: it is damaged, or not of that kind; names the key.
    """
    if not path.exists():
        return kind()
    if path.suffix == ".json":
        return read_json(path, kind, fix=_FIX, exit_code=ExitCode.DAMAGED)
    try:
        values = yaml.safe_load(path.read_bytes()) or {}
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        raise damaged(str(path), f"cannot be read ({error})", _FIX) from error
    return convert(values, kind, where=str(path), fix=_FIX, exit_code=ExitCode.DAMAGED)
