"""A fault within one request ends that request: the server goes on with the others."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import ENDLESS, RunningServer, open_stream, serving_here, wait_until
from torch import Tensor

from kiem.inference.engine import Engine, Request
from kiem.inference.loading import LoadedModel, load_for_inference
from kiem.inference.sampling import SamplingParams
from kiem.inference.server.worker import Worker
from kiem.tokenizer.tokenizer import Tokenizer


class FaultyModel:
    """Puts a fault into a model: one that a request meets when it comes to a certain token.

    Attributes:
        kind: where the fault is; None: nowhere.
        token: at which.
    """

    def __init__(self, loaded: LoadedModel):
        self.kind: str | None = None
        self.token = -1
        self._ids = torch.empty(0)
        loaded.model.model.embed_tokens.register_forward_pre_hook(self._read)
        loaded.model.model.norm.register_forward_hook(self._spoil)

    def meets(self, kind: str, ids: Any) -> bool:
        return self.kind == kind and self.token in ids

    def _read(self, _: torch.nn.Module, given: tuple[Tensor]) -> None:
        self._ids = given[0]
        ids = self._ids.flatten().tolist()
        if self.meets("reading" if self._ids.shape[1] > 1 else "writing", ids):
            raise torch.OutOfMemoryError("an example of a fault")

    def _spoil(self, _: torch.nn.Module, __: object, out: Tensor) -> Tensor:
        is_hit = (self._ids == self.token) & (self.kind == "not a number")
        return torch.where(is_hit[..., None], torch.nan, out)


class FaultyTokenizer(Tokenizer):
    fault: FaultyModel

    def decode(self, ids: Any) -> str:
        if self.fault.meets("text", ids):
            raise RuntimeError("an example of a fault")
        return super().decode(ids)


PROMPT = [2, 300, 301, 302]
RANDOM = {"temperature": 5, "top_p": 1, "repetition_penalty": 1}


@pytest.fixture(scope="module")
def faulty(trained_run: Path) -> Iterator[tuple[RunningServer, FaultyModel, int]]:
    """A server, its faults, and a token that it writes after PROMPT but not after "De"."""
    loaded = load_for_inference(str(trained_run / "final_model"), "fp32")
    engine = Engine(loaded.model, None, max_requests=2, max_tokens=200)
    tokens: tuple[list[int], list[int]] = [], []
    asked = [
        Request(PROMPT, SamplingParams(**RANDOM, max_new_tokens=3), seed=1),
        Request(
            [2, *loaded.tokenizer.encode("De")],
            SamplingParams(**ENDLESS, max_new_tokens=120),
            seed=0,
        ),
    ]
    for number, output in engine.stream(asked):
        assert output.token is not None
        tokens[number].append(output.token)
    token = next(token for token in tokens[0] if token not in tokens[1])
    fault = FaultyModel(loaded)
    given = {each.name: getattr(loaded.tokenizer, each.name) for each in fields(Tokenizer)}
    tokenizer = FaultyTokenizer(**given)
    object.__setattr__(tokenizer, "fault", fault)
    with serving_here(LoadedModel(loaded.model, tokenizer, 0.0)) as running:
        yield running, fault, token


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *(("reading", 0), ("not a number", 0), ("text", 0)),
        *(("not a number", 1), ("text", 1), ("writing", 1)),
    ],
)
def test_a_fault_ends_the_request_that_meets_it(
    faulty: tuple[RunningServer, FaultyModel, int],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    place: int,
    stream: bool,
) -> None:
    """Again and again, in the prompt or after it, beside another that goes on."""
    server, fault, token = faulty
    asked = {"prompt": PROMPT, "max_tokens": 4, "seed": 1, "logprobs": 1, **RANDOM}
    neighbour = {"prompt": "De", "max_tokens": 120, "seed": 1, **ENDLESS}
    fault.kind = None
    before, expected = server.complete(**asked)[1], server.complete(**neighbour)[1]
    connection, answer = open_stream(server, max_tokens=120)
    fault.kind, fault.token = kind, PROMPT[-1] if place == 0 else token
    for n in (1, 2, 1, 2, 1):
        status, _, text = server.ask("POST", "/v1/completions", {**asked, "n": n, "stream": stream})
        is_refused = not stream or (kind, place) == ("text", 0)
        assert status == (500 if is_refused else 200)
        error = json.loads(text if is_refused else text.strip().split("data: ")[-1])["error"]
        assert error["type"] == "server_error"
        assert "example" not in text
    fault.kind = None
    rest = answer.read().decode()
    connection.close()
    if kind == "writing":  # they share that pass
        assert rest.strip().endswith("}}")
    else:
        parts = [json.loads(line[6:]) for line in rest.split("\n\n") if line.startswith("data: {")]
        text = "".join(part["choices"][0]["text"] for part in parts)
        assert expected["choices"][0]["text"].endswith(text)
        assert len(parts) > 100
    wait_until(lambda: server.metric("kiem_sequences_running") == 0)
    assert server.metric("kiem_sequences_waiting") == 0
    assert server.complete(**asked)[1]["choices"] == before["choices"]
    logged = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert len(logged) >= 5
    assert all("not a number" in line or "example of a fault" in line for line in logged)


def test_the_event_loop_may_end_within_a_step(trained_run: Path) -> None:
    """As it does at a second Ctrl-C, which waits for no request."""
    loaded = load_for_inference(str(trained_run / "final_model"), "fp32")
    is_reading, is_over = threading.Event(), threading.Event()

    def read_on(*_: object) -> None:
        is_reading.set()
        assert is_over.wait(60)

    loaded.model.model.norm.register_forward_pre_hook(read_on)
    engine = Engine(loaded.model, loaded.tokenizer, max_requests=2, max_tokens=16)
    worker = Worker(engine, 2)

    async def leave_early() -> None:
        worker.start(lambda: None)
        worker.submit([Request(PROMPT, SamplingParams(0, max_new_tokens=2), seed=0)])
        assert await asyncio.to_thread(is_reading.wait, 60)

    asyncio.run(leave_early())
    is_over.set()
    worker.stop()
