"""echo with logprobs: how likely a prompt's own tokens are, which lm-evaluation-harness asks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serving import RunningServer, serving_here

from kiem.data.read.rows import Document
from kiem.evaluation.bits_per_byte import bits_per_byte, measure
from kiem.evaluation.language_model import own_language_model
from kiem.inference.loading import LoadedModel, load_for_inference

BOS = 2
TEXTS = ["De zee", "Een ë en 𝄞!", "", "x" * 40, "Het water is koud. " * 200]
IDS = [[BOS, 300, 301], [BOS], [300, 301, 302], [400, BOS, 5], []]


@pytest.fixture(scope="module")
def loaded(trained_run: Path) -> LoadedModel:
    return load_for_inference(str(trained_run / "final_model"), "fp32")


@pytest.fixture(scope="module")
def server(trained_run: Path) -> Iterator[RunningServer]:
    """With the fast kernels; `loaded`, which it is compared with, has none."""
    model = load_for_inference(str(trained_run / "final_model"), "fp32", "none")
    with serving_here(model, max_requests=4) as running:
        yield running


def expected(loaded: LoadedModel, prompt: str | list[int]) -> list[float | None]:
    """Returns what `token_logprobs` says of a prompt: of the tokens that the client knows of."""
    ids = prompt if isinstance(prompt, list) else [BOS, *loaded.tokenizer.encode(prompt)]
    read = torch.tensor([ids if ids[:1] == [BOS] else [BOS, *ids]])
    with torch.no_grad():
        logprobs = loaded.model.logits(loaded.model.hidden_states(read))[0].log_softmax(-1)
    known = logprobs[:-1].gather(1, read[0, 1:, None])[:, 0].tolist()
    return [None, *known[len(known) - len(ids) + 1 :]] if ids else []


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize(
    "prompt", [*TEXTS, *(ids for ids in IDS if ids), TEXTS, IDS], ids=lambda p: repr(p)[:20]
)
def test_what_is_said_of_a_prompt_is_the_models(
    server: RunningServer, loaded: LoadedModel, prompt: Any, max_tokens: int
) -> None:
    asked = {"prompt": prompt, "max_tokens": max_tokens, "seed": 1, "logprobs": 2}
    status, answer = server.complete(**asked, echo=True)
    assert status == 200, answer
    status, without = server.complete(**asked)
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    assert len(answer["choices"]) == len(prompts)
    for one, choice, alone in zip(prompts, answer["choices"], without["choices"], strict=True):
        told, new = choice["logprobs"], alone["logprobs"]
        scores = expected(loaded, one)
        num_read = len(scores)
        assert told["token_logprobs"][:num_read] == pytest.approx(scores, abs=1e-4)
        assert told["tokens"][num_read:] == new["tokens"]
        assert told["token_logprobs"][num_read:] == new["token_logprobs"]
        echoed = one if isinstance(one, str) else loaded.tokenizer.decode(one)
        assert choice["text"] == echoed + alone["text"]
        assert choice["finish_reason"] == alone["finish_reason"]
        offsets = [place - len(echoed) for place in told["text_offset"][num_read:]]
        assert offsets == new["text_offset"]
        tops = told["top_logprobs"]
        assert all(top is None or 1 <= len(top) <= 2 for top in tops)
        assert [top is None for top in tops] == [p is None for p in told["token_logprobs"]]
        for token, place in zip(told["tokens"], told["text_offset"], strict=True):
            if not token.startswith("bytes:") and token not in ("<bos>", "<eos>"):
                assert choice["text"].startswith(token, place)
    assert answer["usage"] == without["usage"]


def test_tokens_after_bytes_that_are_no_character_begin_where_they_are_written(
    server: RunningServer, loaded: LoadedModel
) -> None:
    half = loaded.tokenizer.implementation.token_to_id("<0xC3>")
    ids = [BOS, half, *loaded.tokenizer.encode("een zee")]
    _, answer = server.complete(prompt=ids, max_tokens=0, logprobs=0, echo=True)
    text, told = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
    assert text == "\ufffdeen zee"
    assert told["tokens"][1] == "bytes:\\xc3"
    for token, place in [*zip(told["tokens"], told["text_offset"], strict=True)][2:]:
        assert text.startswith(token, place)


def test_a_stream_says_the_same(server: RunningServer) -> None:
    asked: dict[str, Any] = {"prompt": TEXTS[:3], "max_tokens": 3, "logprobs": 1, "n": 2, "seed": 1}
    asked["echo"] = True
    _, whole = server.complete(**asked)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        parts = [p.to_dict() for p in client.completions.create(model="here", **asked, stream=True)]
    for index, choice in enumerate(whole["choices"]):
        own = [p["choices"][0] for p in parts if p["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, entries in choice["logprobs"].items():
            assert [entry for part in own for entry in part["logprobs"][name]] == entries
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_the_end_of_a_text_has_a_probability_too(server: RunningServer) -> None:
    """lm_eval leaves out the last entry, which it takes for a new token."""
    asked = {"prompt": "De", "max_tokens": 500, "logprobs": 0, "temperature": 100, "top_p": 1}
    for seed in range(20):
        _, answer = server.complete(**asked, seed=seed)
        told, used = answer["choices"][0]["logprobs"], answer["usage"]["completion_tokens"]
        if answer["choices"][0]["finish_reason"] == "stop":
            break
        assert len(told["tokens"]) == used
    assert told["tokens"][-1] == "<eos>"
    assert len(told["tokens"]) == used + 1
    assert told["text_offset"][-1] == len(answer["choices"][0]["text"])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_lm_eval_finds_the_figure_of_evaluate_py(
    server: RunningServer, loaded: LoadedModel, sample_texts: list[str], batch_size: int
) -> None:
    """The requests of its local-completions, and what it makes of the answers (version 0.4.13)."""
    texts = sample_texts[:12]
    nats = 0.0
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        body = {
            "model": "here",
            "prompt": [[BOS, *ids] for ids in loaded.tokenizer.encode_batch(batch)],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        status, _, text = server.ask("POST", "/v1/completions", body)
        assert status == 200, text
        for choice in sorted(json.loads(text)["choices"], key=lambda c: c["index"]):
            context_length = 1  # the <bos>
            nats -= sum(choice["logprobs"]["token_logprobs"][context_length:-1])
            for top in choice["logprobs"]["top_logprobs"][context_length:-1]:
                assert max(top.values()) <= 0
    model = own_language_model(loaded.model, loaded.tokenizer, context=4096)
    measured = measure(model, iter([Document(text, "", 1) for text in texts]))
    found = bits_per_byte(measured, None, 0)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert nats / (math.log(2) * num_bytes) == pytest.approx(found["bpb"], abs=1e-4)
