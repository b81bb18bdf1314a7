"""The server: OpenAI's client finds what it knows, and nonsense is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import run_script
from serving import ENDLESS, ServerProcess, open_stream, serving, wait_until

from kiem.inference.engine import Engine, Request, RequestOutput
from kiem.inference.loading import load_for_inference
from kiem.inference.sampling import SamplingParams
from kiem.inference.server.worker import Worker

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model(trained_run: Path) -> Path:
    return trained_run / "final_model"


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    """With two slots and two places to wait."""
    with serving(model, "--max-requests", "2", "--max-waiting", "2") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as made:
        yield made


def test_a_completion_is_what_inference_py_writes(client: openai.OpenAI, model: Path) -> None:
    answer = client.completions.create(
        model="short", prompt="Nederland is", max_tokens=20, seed=42, n=2
    )
    done = run_script(
        "inference.py",
        *("--model-path", model, "--prompt", "Nederland is", "--max-new-tokens", "20"),
        *("--num-return-sequences", "2", "--seed", "42"),
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert "Nederland is" + choice.text in done.stdout
        assert choice.finish_reason in ("stop", "length")
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert f"{answer.usage.completion_tokens} tokens" in done.stdout
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_gives_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "short", "prompt": ["De zee", "Een fiets"], "seed": 5}
    asked |= {"max_tokens": 30, "logprobs": 2}
    whole = client.completions.create(**asked)
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    told: Any = {"include_usage": True, "continuous_usage_stats": True}  # the latter is vLLM's
    for part in client.completions.create(**asked, stream=True, stream_options=told):
        assert part.usage is not None
        usage = part.usage
        for choice in part.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert reasons[choice.index] == choice.finish_reason
    assert usage == whole.usage


def test_the_same_alone_and_in_company(server: ServerProcess) -> None:
    def texts(seed: int) -> list[str]:
        _, answer = server.complete(prompt=f"Een huis {seed}", seed=seed, max_tokens=40)
        return [choice["text"] for choice in answer["choices"]]

    with ThreadPoolExecutor(4) as company:
        assert list(company.map(texts, range(4))) == list(map(texts, range(4)))


def test_logprobs_add_up(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="short", prompt="Het", max_tokens=8, logprobs=5, temperature=0, seed=1,
        extra_body={"repetition_penalty": 1},
    )  # fmt: skip
    told = answer.choices[0].logprobs
    assert told is not None
    text = answer.choices[0].text
    for place, token in enumerate(told.tokens):
        top = told.top_logprobs[place]
        assert len(top) <= 5
        assert max(top, key=top.__getitem__) == token  # greedy
        assert top[token] == told.token_logprobs[place]
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
        if not token.startswith("bytes:"):
            assert text[told.text_offset[place] :].startswith(token)
    only = client.completions.create(
        model="short", prompt="Het", max_tokens=2, logprobs=0, temperature=0, seed=1
    )
    assert only.choices[0].logprobs.top_logprobs == [{}, {}]
    assert len(only.choices[0].logprobs.token_logprobs) == 2


def test_stop_echo_and_token_ids(client: openai.OpenAI, server: ServerProcess) -> None:
    asked: dict[str, Any] = {"model": "short", "prompt": "De stad", "seed": 2, "max_tokens": 40}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:13]
    stopped = client.completions.create(**asked, stop=[stop, "\x00"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    assert client.completions.create(**asked, echo=True).choices[0].text == "De stad" + text
    stream = client.completions.create(**asked, echo=True, stream=True)
    assert "".join(part.choices[0].text for part in stream) == "De stad" + text
    _, first = server.complete(prompt=[5, 300, 301], seed=1, max_tokens=4)
    _, second = server.complete(prompt=[[2, 5, 300, 301]], seed=1, max_tokens=4)
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens"] == 4


def test_models_and_openais_errors(client: openai.OpenAI) -> None:
    assert [entry.id for entry in client.models.list()] == ["short"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="short", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="short", prompt="x", max_tokens=4096)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 5}, "n"),
        ({"prompt": ["x"] * 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[99999]]}, "prompt"),
        ({"prompt": "x", "logprobs": 21, "echo": True}, "logprobs"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"prompt": "x", "messages": [{}]}, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    server: ServerProcess, body: dict[str, Any], param: str | None
) -> None:
    status, answer = server.complete(**body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    assert answer["error"]["message"]


def test_a_thousand_malformed_requests(server: ServerProcess) -> None:
    """Seeded; each is wrong by construction. All get a 4xx, and the server is as before."""
    chance = random.Random(6)
    valid = json.dumps({"prompt": "Nederland is", "max_tokens": 2, "stop": ["a"], "n": 1})
    junk: list[Any] = [None, True, -1, 1.5, 10**40, "", "x", [], [[]], [None], {}, {"a": []}, "\0"]
    fields = ("prompt", "max_tokens", "n", "temperature", "top_p", "stop", "stream", "logprobs")

    def bad_value() -> bytes:
        body = json.loads(valid)
        body[chance.choice(fields)] = chance.choice([{"a": 1}, [{}], [[["x"]]], {"b": [None]}])
        return json.dumps(body).encode()

    def unknown_field() -> bytes:
        name = "".join(chance.choices("abcxyz_\u00e9 .$`", k=chance.randint(1, 9))) + "!"
        asked = chance.choice([value for value in junk if value])  # the others ask for nothing
        return json.dumps({**json.loads(valid), name: asked}).encode()

    def cut() -> bytes:
        return valid.encode()[: chance.randrange(len(valid))]

    def noise() -> bytes:
        return b"\xff" + chance.randbytes(chance.randint(0, 200))

    def deep() -> bytes:
        bracket = chance.choice(['{"prompt":', "["])
        return (bracket * chance.randint(2, 100_000)).encode()

    def odd_number() -> bytes:
        number = chance.choice(["1e999", "-1e999", "NaN", "Infinity", "-5", "0x10", "1" * 5000])
        return b'{"prompt": "x", "temperature": ' + number.encode() + b"}"

    def surrogate() -> bytes:
        return b'{"prompt": "a\\ud83d' + chance.choice([b"", b"x", b"\\ud83d"]) + b'"}'

    kinds: list[Callable[[], bytes]] = [
        *(bad_value, unknown_field, cut, noise, deep, odd_number, surrogate)
    ]
    paths = ("/v1/completions",) * 8 + ("/v1/chat/completions", "/v1/%00", "/../etc/passwd", "/v1")
    with contextlib.closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        for number in range(1000):
            body, path = chance.choice(kinds)(), chance.choice(paths)
            method = chance.choice(("POST",) * 6 + ("PUT", "DELETE", "PATCH"))
            kind = chance.choice(
                ("application/json",) * 6 + ("text/plain", "", "\xe9/x; charset=\x7f")
            )
            connection.request(method, path, body, {"content-type": kind})
            answer = connection.getresponse()
            text = answer.read().decode()
            assert 400 <= answer.status < 500, (number, method, path, kind, body[:200], text)
            assert json.loads(text)["error"]["message"]
    assert server.ask("GET", "/health")[0] == 200
    assert server.metric("kiem_sequences_running") == 0
    assert server.complete(prompt="x", max_tokens=1)[0] == 200


def test_what_is_not_even_http(server: ServerProcess) -> None:
    chance = random.Random(7)
    for _ in range(30):
        line = chance.choice([b"GET / HTTP/9.9", b"\x16\x03\x01", b"POST", b"GET /\xff HTTP/1.1"])
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
            raw.sendall(line + chance.randbytes(20) + b"\r\n\r\n")
            assert raw.recv(1000).startswith((b"HTTP/1.1 4", b""))
    with socket.create_connection(("127.0.0.1", server.port)) as leaves_early:
        leaves_early.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    for headers in ({"content-length": "-1"}, {"content-length": "9" * 30}, {"x": "y" * 100_000}):
        with contextlib.closing(HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
            connection.putrequest("POST", "/v1/completions")
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            assert 400 <= connection.getresponse().status < 500
    assert server.ask("GET", "/health")[0] == 200


def test_a_body_that_is_too_large(server: ServerProcess) -> None:
    status, _, text = server.ask("POST", "/v1/completions", {"prompt": "x" * (1 << 20)})
    assert status == 413
    assert "1048576" in json.loads(text)["error"]["message"]


def test_disconnecting_cancels_the_request(server: ServerProcess) -> None:
    finished = server.metric('kiem_sequences_finished_total{reason="length"}')
    connection, answer = open_stream(server)
    assert server.metric("kiem_sequences_running") == 1
    answer.close()
    connection.close()
    wait_until(lambda: server.metric("kiem_sequences_running") == 0)
    # One that waits for a whole answer, and leaves as well.
    body = json.dumps({"prompt": "De", "max_tokens": 3000, "n": 3, "seed": 1, **ENDLESS}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.metric("kiem_sequences_waiting") == 1)
    wait_until(lambda: server.metric("kiem_sequences_running") == 0)
    assert server.metric("kiem_sequences_waiting") == 0
    assert server.metric('kiem_sequences_finished_total{reason="length"}') == finished


def test_more_than_the_queue_takes_is_refused(server: ServerProcess) -> None:
    streams = [open_stream(server) for _ in range(2)]
    body = json.dumps({"prompt": "De", "n": 2, "max_tokens": 3000, "seed": 1, **ENDLESS}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as waiting:
        waiting.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.metric("kiem_sequences_waiting") == 2)
        status, headers, text = server.ask("POST", "/v1/completions", {"prompt": "x"})
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(text)["error"]["type"] == "rate_limit_error"
        assert server.ask("GET", "/health")[0] == 200
    for connection, answer in streams:
        answer.close()
        connection.close()
    wait_until(lambda: server.metric("kiem_sequences_running") == 0)
    assert server.complete(prompt="x", max_tokens=1)[0] == 200


def test_what_was_written_before_anybody_listened_is_not_lost(model: Path) -> None:
    loaded = load_for_inference(str(model), "fp32")
    engine = Engine(loaded.model, loaded.tokenizer, max_requests=2, max_tokens=16)
    params = SamplingParams(temperature=0, max_new_tokens=2)
    texts = [[2, *loaded.tokenizer.encode(text)] for text in ("Het", "Een")]
    requests = [Request(ids, params, seed=1) for ids in texts]

    async def listen_late() -> list[tuple[int, RequestOutput]]:
        worker = Worker(engine, 2)
        worker.start(lambda: None)
        job = worker.submit(requests)
        while engine.num_waiting or engine.num_running:
            await asyncio.sleep(0.01)
        found = [event async for event in job.outputs()]
        worker.stop()
        return found

    numbers = [number for number, _ in asyncio.run(asyncio.wait_for(listen_late(), 60))]
    assert sorted(numbers) == [0, 0, 1, 1]
