"""What the files of a run directory must be like for the report: types and ranges of what it shows.

People and other programs write to them as well: they copy lines, add evaluations, cut logs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from kiem.core.errors import ExitCode
from kiem.core.json_input import convert

# Finite: neither JSON nor a chart has others.
_Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Sample(msgspec.Struct):
    prompt: str
    text: str


class Line(msgspec.Struct):
    """A line of metrics.jsonl; one that is otherwise counts as damaged."""

    step: _Count
    tokens: _Count = 0
    seconds: _Amount = 0.0
    loss: _Number = 0.0
    learning_rate: _Number = 0.0
    grad_norm: _Number = 0.0
    tokens_per_second: _Number = 0.0
    mfu: _Number = 0.0
    memory_bytes: _Count = 0
    joules: _Amount = 0.0
    test_loss: _Number = 0.0
    test_bpb: _Number = 0.0
    samples: list[_Sample] = []
    warning: str = ""


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


class _Text(msgspec.Struct):
    bytes_per_source: dict[str, _Count] = {}


class _Rows(msgspec.Struct):
    num_rows: _Count
    num_unused_rows: _Count = 0


class _Steps(msgspec.Struct):
    max_steps: _Count | None = None


class Facts(msgspec.Struct):
    """What may be in run.json, training_summary.json and evaluation.json."""

    finished: str = ""
    per_source: dict[str, _Bits] = {}
    minimal_pairs: _Pairs | msgspec.UnsetType = msgspec.UNSET
    data: _Text | msgspec.UnsetType = msgspec.UNSET
    tokenizer: _Rows | msgspec.UnsetType = msgspec.UNSET
    recipe: _Steps | msgspec.UnsetType = msgspec.UNSET


class _Chunked(msgspec.Struct):
    chunk_size: _Count


class _Source(msgspec.Struct):
    kind: str
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None


class _Data(msgspec.Struct):
    options: _Chunked
    source: _Source
    train_documents: _Count
    train_tokens: _Count
    test_documents: _Count
    manifest_sha256: str


class _Tokenizer(msgspec.Struct):
    origin: str
    num_rows: _Count
    sha256: str


class _Recipe(msgspec.Struct):
    batch_size: _Count
    accumulation: _Count
    chunks_per_step: _Count
    learning_rate: _Number


class _Hardware(msgspec.Struct):
    devices: _Count
    device: str
    precision: str


class RunFacts(msgspec.Struct):
    """What must be there if a file says which model it is about."""

    model: str
    parameters: _Count
    initialized_from: str
    data: _Data
    tokenizer: _Tokenizer
    recipe: _Recipe
    hardware: _Hardware
    versions: dict[str, str]


class Options(msgspec.Struct):
    """What is used of config.yaml; the rest is shown as it is."""

    price: _Amount | None = None


def check(values: Any, path: Path, fix: str) -> dict[str, Any]:
    """Returns what a file of a run directory holds by name, if the report can use it.

    Args:
        values: the content of the file.
        path: the file.
        fix: what to do otherwise.

    Raises:
        UserError: it cannot; names the key.
    """

    def as_kind(kind: type[Any]) -> Any:
        return convert(values, kind, where=str(path), fix=fix, exit_code=ExitCode.DAMAGED)

    found: dict[str, Any] = as_kind(dict[str, Any])
    is_options = path.suffix == ".yaml"
    as_kind(Options if is_options else Facts)
    if "model" in found and not is_options:
        as_kind(RunFacts)
    return found
