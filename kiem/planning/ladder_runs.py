"""Runs of a ladder: trainings of several sizes, lengths and rates, a JSON line for each.

`kiem ladder` makes them; `transfer` and `forecast` fit laws to them. The lines in ladder.jsonl
beside this file are those of kiem's own ladder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from kiem.core.errors import ExitCode, damaged, not_found
from kiem.core.json_input import JsonError, convert, parse_json

RUNS_FILE = "runs.jsonl"
_FIX = "Remove the line, or the file; `kiem ladder` then trains its run again."
_Count = Annotated[int, msgspec.Meta(ge=1, lt=1 << 50)]
_Amount = Annotated[float, msgspec.Meta(gt=0, le=1e15)]


class LadderRun(msgspec.Struct, frozen=True):
    """A training of a ladder and what it reached.

    Attributes:
        model: name of the shape.
        num_layer_parameters: parameters without the embedding.
        vocab_size: rows of the embedding.
        tokens: trained on.
        tokens_per_step: in an update.
        learning_rate: the highest.
        bpb: bits per byte of the test split; None if the loss was not finite.
        seconds: of updates.
        wall_seconds: of the whole training.
        recipe: kiem's RECIPE_VERSION.
        data: of the chunk directory, by `text_hash`.
        text: what the text is.
        hardware: device and precision.
        date: of the day, as in 2026-11-30.
    """

    model: str
    num_layer_parameters: _Count
    vocab_size: _Count
    tokens: _Count
    tokens_per_step: _Count
    learning_rate: _Amount
    bpb: _Amount | None
    seconds: _Amount
    wall_seconds: _Amount
    recipe: int
    data: str
    text: str
    hardware: str
    date: str

    @property
    def reached(self) -> float:
        """Bits per byte; infinite if the loss was not finite."""
        return math.inf if self.bpb is None else self.bpb


class Optimum(NamedTuple):
    """The best learning rate of a rung, and the bits per byte that it would give."""

    learning_rate: float
    bpb: float


@dataclass(frozen=True)
class Rung:
    """The runs of one size and length; they differ in their learning rate."""

    runs: tuple[LadderRun, ...]

    @property
    def num_layer_parameters(self) -> int:
        """Parameters without the embedding."""
        return self.runs[0].num_layer_parameters

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.runs[0].tokens

    @property
    def best(self) -> float:
        """Bits per byte of the best run."""
        return min(run.reached for run in self.runs)

    def optimum(self) -> Optimum | None:
        """Returns the vertex of a parabola of bits per byte over the logarithm of the rate.

        It goes through the best run and its neighbours; None if the best run has no neighbour on
        one side, so that the optimum is not between them.
        """
        runs = sorted(self.runs, key=lambda run: run.learning_rate)
        values = [run.reached for run in runs]
        best = int(np.argmin(values))
        near = slice(best - 1, best + 2)
        if not 0 < best < len(runs) - 1 or not np.isfinite(values[near]).all():
            return None
        logs = np.log([run.learning_rate for run in runs[near]])
        parabola = np.polyfit(logs, values[near], 2)
        place = -parabola[1] / (2 * parabola[0])
        return Optimum(float(np.exp(place)), float(np.polyval(parabola, place)))


def rungs_of(runs: Iterable[LadderRun]) -> list[Rung]:
    """Returns the rungs that have a result, by size and then by length."""
    groups: dict[tuple[int, int], dict[float, LadderRun]] = {}
    for run in runs:
        rung = groups.setdefault((run.num_layer_parameters, run.tokens), {})
        rung[run.learning_rate] = run
    rungs = [Rung(tuple(groups[key].values())) for key in sorted(groups)]
    return [rung for rung in rungs if math.isfinite(rung.best)]


def read_runs(path: Path) -> list[LadderRun]:
    """Returns the runs of a ladder; a last line that a kill has cut is left out.

    Raises:
        UserError: the file cannot be read, or a line is no run; names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        fix = "Name the runs.jsonl that `kiem ladder` made, or leave --ladder out."
        raise not_found(str(path), f"cannot be read ({error.strerror})", fix) from error
    return _parse(data, str(path))


def built_in_runs() -> list[LadderRun]:
    """Returns the runs of kiem's own ladder."""
    file = resources.files("kiem.planning").joinpath("ladder.jsonl")
    return _parse(file.read_bytes(), "ladder.jsonl")


def extent(rungs: Sequence[Rung]) -> str:
    """Returns what sizes and lengths a ladder has, for people."""
    sizes = [rung.num_layer_parameters / 1e6 for rung in rungs]
    tokens = [rung.tokens / 1e6 for rung in rungs]
    return (
        f"rungs of {min(sizes):.2g} to {max(sizes):.3g} million parameters and "
        f"{min(tokens):.2g} to {max(tokens):.3g} million tokens"
    )


def runs_like_the_last(runs: Sequence[LadderRun]) -> list[LadderRun]:
    """Returns the runs that can be compared with the last one: of its text, vocabulary, recipe."""
    return [run for run in runs if (run.data, run.recipe) == (runs[-1].data, runs[-1].recipe)]


def text_hash(manifest: dict[str, Any]) -> str:
    """Returns a hash of tokens and vocabulary of a chunk directory, wherever it was made."""
    content = [manifest["tokenizer"]["sha256"]]
    for split in ("train", "test"):
        content += [shard["sha256"] for shard in manifest["splits"][split]["shards"]]
    return hashlib.sha256("".join(content).encode()).hexdigest()[:16]


def ladder_folder(dataset_path: Path) -> Path:
    """Returns where the ladder of a chunk directory is, unless it was made elsewhere."""
    return dataset_path.with_name(f"{dataset_path.resolve().name}.ladder")


def _parse(data: bytes, where: str) -> list[LadderRun]:
    runs = []
    *lines, _ = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        place = f"{where}:{number}"
        try:
            value = parse_json(line)
        except JsonError as error:
            raise damaged(place, str(error), _FIX) from error
        runs.append(convert(value, LadderRun, where=place, fix=_FIX, exit_code=ExitCode.DAMAGED))
    return runs
