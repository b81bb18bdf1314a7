"""Numbers that go wrong: what stops, what is skipped, what is only said."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lives import Lives, outcome
from rich.console import Console

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode
from kiem.data.chunks import Chunks
from kiem.data.mixture import read_mixture
from kiem.data.order import chunk_numbers
from kiem.parallel.distributed import Distributed
from kiem.training.anomalies import (
    SPIKE_WINDOW,
    spike_limit,
    warnings_after_update,
    warnings_before,
)
from kiem.training.run import Run, TrainState
from kiem.training.setup import setup

QUIET = Console(quiet=True)
# The loss of every batch that begins with these tokens is changed, in whichever process reads it.
PATCH = """
from kiem.model.gemma3 import Gemma3
from kiem.training import anomalies
anomalies.SPIKE_WINDOW = 4
forward = Gemma3.forward
def changed(self, input_ids, *others):
    loss, nats = forward(self, input_ids, *others)
    is_it = input_ids[0, :32].tolist() == {tokens}
    return (loss * {factor}, nats * {factor}) if is_it and torch.is_grad_enabled() else (loss, nats)
Gemma3.forward = changed
"""


@pytest.fixture(scope="module")
def lives(sample_chunks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    lives = Lives(sample_chunks, tmp_path_factory.mktemp("lives"))
    yield lives
    lives.close()


def patch(chunks: Path, step: int, factor: str, processes: int = 1) -> tuple[str, int]:
    """A change to the loss of the last process in one update, and the chunk that causes it."""
    options, per_step = TrainingOptions(dataset_path=(chunks,)), 2 * processes
    mixture = read_mixture(options)
    chunk = int(chunk_numbers(mixture.order(options, per_step, None), step)[per_step - 2])
    tokens = mixture.train_chunks().read(np.array([chunk]))[0, :32].tolist()
    return PATCH.format(tokens=tokens, factor=factor), chunk


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [(), ("--shard", "parameters", "--optimizer", "adamw")])
def test_not_a_number_in_one_process_stops_all_before_the_update(
    options: tuple[str, ...], lives: Lives, sample_chunks: Path, tmp_path: Path
) -> None:
    change, chunk = patch(sample_chunks, 4, "float('nan')", processes=2)
    codes = lives.run(tmp_path, *options, processes=2, patch=change)
    assert codes == [ExitCode.NOT_FINITE] * 2
    evidence = json.loads((tmp_path / "run" / "not-finite-step-5.json").read_text())
    assert evidence["step"] == 5
    assert chunk in [entry["chunk"] for entry in evidence["chunks"]]
    assert all(len(entry["tokens"]) == 64 for entry in evidence["chunks"])
    assert len(evidence["parameters_with_bad_gradients"]) > 10
    assert evidence["loss"] == "nan"
    assert "chunks and tokens are in" in lives.log.read_text()


def interrupted(lives: Lives, output: Path, change: str, after_step: int, *more: str) -> None:
    """Kills a run when it has reached an update, and lets it go on to its end."""
    pids = lives.start(output, *more, patch=change)
    ends = time.monotonic() + 120
    metrics = output / "run" / "metrics.jsonl"
    while not metrics.exists() or f'"step": {after_step},' not in metrics.read_text():
        assert time.monotonic() < ends, lives.log.read_text()
        time.sleep(0.002)
    os.kill(pids[0], signal.SIGKILL)
    lives.wait(pids)
    assert lives.run(output, *more, patch=change) == [0]


def test_not_a_number_is_skipped_when_asked(
    lives: Lives, sample_chunks: Path, tmp_path: Path
) -> None:
    """Back to the newest checkpoint, on without that update; the same after a kill behind it."""
    change, _ = patch(sample_chunks, 7, "float('inf')")
    skip = ("--on-nan", "skip")
    assert lives.run(tmp_path / "a", *skip, patch=change) == [0], lives.log.read_text()
    run = tmp_path / "a" / "run"
    assert outcome(run)["state"]["num_skipped"] == 1
    warnings = [line["warning"] for line in lines(run) if "warning" in line]
    assert any("back to step 6, and then without step 8" in text for text in warnings)
    updates = [line for line in lines(run) if "learning_rate" in line]
    assert [line["step"] for line in updates] == list(range(1, 13))
    assert [line["step"] for line in updates if "loss" not in line] == [8]
    assert (run / "not-finite-step-8.json").exists()
    interrupted(lives, tmp_path / "b", change, 10, *skip)
    assert outcome(tmp_path / "b" / "run") == outcome(run)


def test_a_spike_is_skipped_and_counted(lives: Lives, sample_chunks: Path, tmp_path: Path) -> None:
    change, _ = patch(sample_chunks, 7, "9.0")
    assert lives.run(tmp_path / "a", patch=change) == [0], lives.log.read_text()
    run = tmp_path / "a" / "run"
    found = outcome(run)
    assert found["state"]["num_skipped"] == 1
    assert len(found["state"]["recent_losses"]) == 4
    warnings = [line["warning"] for line in lines(run) if "warning" in line]
    assert any("step 8 is skipped: its loss" in text for text in warnings)
    interrupted(lives, tmp_path / "b", change, 11)
    assert outcome(tmp_path / "b" / "run") == found
    assert lives.run(tmp_path / "c", "--spike-sigmas", "0", patch=change) == [0]
    assert outcome(tmp_path / "c" / "run")["state"]["num_skipped"] == 0


def test_the_limit_of_a_spike() -> None:
    chance = np.random.default_rng(1)
    losses = chance.normal(3.0, 0.1, SPIKE_WINDOW).tolist()
    limit = spike_limit(losses, 6)
    assert limit == pytest.approx(3.6, abs=0.1)
    assert limit == np.mean(losses) + 6 * np.std(losses)
    assert spike_limit(losses[1:], 6) == math.inf
    assert spike_limit(losses, 0) == math.inf
    assert spike_limit([2.0] * SPIKE_WINDOW, 6) == pytest.approx(2.12)
    # Losses that stay high are believed after a while, not skipped for ever.
    num_skipped = 0
    for _ in range(100):
        limit = spike_limit(losses, 6)
        num_skipped += limit < 5.0
        losses = [*losses[1:], min(5.0, limit)]
    assert 3 < num_skipped < 30


@pytest.fixture
def run(sample_chunks: Path, tmp_path: Path) -> Iterator[Run]:
    """A run that has not begun."""
    options = TrainingOptions(
        dataset_path=(sample_chunks,), model="gemma3-micro", output_dir=tmp_path, max_steps=1000
    )
    distributed = Distributed(0, 1, torch.device("cpu"), "fp32", 1e9)
    with setup(options, distributed, QUIET) as (run, _):
        yield run


def with_chunks(run: Run, chunks: np.ndarray) -> Run:
    size = chunks.shape[1]
    train = Chunks([chunks.astype(np.int32)], np.array([0]), len(chunks), size)
    run.spec.data.manifest["splits"]["train"]["chunks"] = len(chunks)
    data = replace(run.spec.data, train=train)
    return replace(run, spec=replace(run.spec, data=data))


def said_before(run: Run) -> str:
    return "\n".join(warnings_before(run))


def test_sanity_checks_of_data_and_length(run: Run) -> None:
    said = said_before(run)
    assert "about 20 for each are usual" in said
    for other in ("padding", "are never learnt from", "several times in every update"):
        assert other not in said
    whole = run.spec.data.train.read(np.arange(run.spec.data.train.num_chunks))
    run.spec.data.manifest["splits"]["train"]["padding_tokens"] = whole.size // 4
    assert "25% of the chunks is padding" in said_before(with_chunks(run, whole))
    long = with_chunks(run, np.concatenate([whole] * 1000))
    assert "of the chunks: the others are never learnt from" in said_before(long)
    assert "several times in every update" in said_before(with_chunks(run, whole[:3]))


def said_after(run: Run, step: int, loss: float) -> str:
    state = TrainState(step=step, recent_losses=[loss] * SPIKE_WINDOW)
    return "\n".join(warnings_after_update(run, state, loss))


def test_sanity_checks_of_the_loss(run: Run) -> None:
    vocabulary = run.spec.config.vocab_size
    assert said_after(run, 1, math.log(vocabulary) + 0.2) == ""
    assert "the first loss is 9.00" in said_after(run, 1, 9.0)
    assert "the first loss is 5.00" in said_after(run, 1, 5.0)
    assert said_after(run, 2, 9.0) == ""
    # A thousand tokens, all equally frequent: ln(1000) is all that frequencies can tell.
    run = with_chunks(
        run, np.random.default_rng(1).permutation(np.arange(10, 1010)).reshape(20, 50)
    )
    assert said_after(run, 300, 6.5) == ""
    stuck = said_after(run, 300, 6.9)
    assert "knowing only how often each token occurs gives 6.91" in stuck
    assert said_after(run, 301, 6.9) == ""
