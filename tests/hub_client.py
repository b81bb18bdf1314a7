"""What tests of kiem.hub share: a Hub with a dataset and models, and a client of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hub_server import HubServer

DATASET = "BramVanroy/wikipedia_culturax_dutch"
MODEL = "google/gemma-3-1b-pt"
OPEN_MODEL = "someone/open-model"
ACCEPTED, NOT_ACCEPTED, INVALID = "hf_AcceptedSecret", "hf_KnownSecret", "hf_InvalidSecret"

SHARDS = ("10k/train-00000-of-00002.parquet", "10k/train-00001-of-00002.parquet")
BIG_BYTES = random.Random(0).randbytes(12_000_000)
DATASET_FILES = {
    "README.md": b"# Dutch",
    SHARDS[1]: b"second shard" * 500,
    SHARDS[0]: b"first shard" * 500,
    "10k/test-00000-of-00001.parquet": b"test shard",
    "1M/train-00000-of-00001.parquet": BIG_BYTES,
}
MODEL_FILES = {
    "README.md": b"# Gemma",
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"weights 1",
    "model-00002-of-00002.safetensors": b"weights 2",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b'{"model": 1}',
    "tokenizer.model": b"sentencepiece",
    "tokenizer_config.json": b'{"bos": 2}',
    "optimizer.bin": b"not wanted",
    "onnx/model.safetensors": b"not wanted",
}

SCRIPT = """
import dataclasses, json, os, sys
from kiem.hub import transfer
from kiem.core.errors import UserError
for name, arguments, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token or ""
    exit_code, result, message = 0, None, None
    try:
        result = getattr(transfer, name)(*arguments)
        result = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result
    except UserError as error:
        exit_code, message = error.exit_code, str(error)
    print(json.dumps([exit_code, result, message], default=str))
"""


class Call(NamedTuple):
    function: str
    arguments: tuple[str, ...]
    token: str | None = None


class Outcome(NamedTuple):
    exit_code: int
    result: Any
    message: str | None


@dataclass
class Client:
    """Calls functions of kiem.hub in new processes that share one cache."""

    hub: HubServer
    cache: Path

    def run(self, calls: list[Call], first: str = "", **variables: str) -> list[Outcome]:
        environment = {**os.environ, **self.hub.environment(self.cache), **variables}
        done = subprocess.run(
            [sys.executable, "-c", first + SCRIPT, json.dumps(calls)],
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        assert "Secret" not in done.stdout + done.stderr, "every token here holds this word"
        return [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]

    def get(self, function: str, *arguments: str, token: str | None = None, **options: str) -> Any:
        (outcome,) = self.run([Call(function, arguments, token)], **options)
        assert outcome.exit_code == 0, outcome.message
        return outcome.result

    def fail(self, function: str, *arguments: str, **options: str) -> tuple[int, str]:
        (outcome,) = self.run([Call(function, arguments)], **options)
        assert outcome.message is not None
        return outcome.exit_code, outcome.message


@contextmanager
def new_hub() -> Iterator[HubServer]:
    repos = {
        f"datasets/{DATASET}": DATASET_FILES,
        "datasets/someone/incomplete": {"a/train-00000-of-00003.parquet": b"a"},
        MODEL: MODEL_FILES,
        OPEN_MODEL: {"config.json": b"{}", "tokenizer.json": b"{}"},
        "someone/secret": {"config.json": b"{}"},
    }
    with HubServer(
        repos,
        gated=[MODEL],
        private=["someone/secret"],
        tokens=[NOT_ACCEPTED],
        accepted=[ACCEPTED],
    ) as server:
        yield server


def paths_of(hub: HubServer, part: str) -> list[str]:
    return [path for _, path, _ in hub.log if part in path]
