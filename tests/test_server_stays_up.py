"""Whatever is in a request, only that request can fail: every field at its extremes."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import ENDLESS, RunningServer, serving_here, wait_until

from kiem.inference.loading import load_for_inference
from kiem.inference.server import serve
from kiem.inference.server.completions import CompletionBody

BASE = {"prompt": "Nederland is", "max_tokens": 2, "seed": 1}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MEGABYTE = 1_000_000
# As JSON, since some of it no Python value can say.
VALUES = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-0.0",
        "1",
        "-1",
        "2",
        "0.5",
        "16.0",
        "20",
        "21",
        "100",
        "101",
    ),
    *("5e-324", "1e-400", "1e-50", "1e-46", "1e-39", "1.17e-38", "1.18e-38", "1e-30"),
    *("0.9999999999999999", "3.5e38", "1e308", "-1e308", "1e400", "NaN", "Infinity", "-Infinity"),
    *map(str, (2**31, 2**53 + 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**40)),
    *("9" * 4299, "-" + "9" * 4299, "9" * 4301),
    *('""', '"x"', '"0"', r'"\u0000"', r'"\uffff"', r'"\ud800"', r'"\udc00x"', '"<eos><bos><pad>"'),
    *("[]", "[[]]", "[null]", '[""]', '["a"]', '["a", "b"]', "[1, 2]", "[[1], [2]]", "[0.5]"),
    *("[1, 18446744073709551616]", "[-1]", '["a", 1]', "[" * 50 + "]" * 50, "{}", '{"a": 1}'),
    '{"include_usage": true}',
)
IN_RANGE: dict[str, tuple[Any, ...]] = {
    "temperature": (0, -0.0, 5e-324, 1e-50, 1e-46, 1e-39, 1.17e-38, 1.18e-38, 1e-30, 1e-3, 1, 100),
    "top_k": (-1, 0, 1, 2, 1023, 1024, 1025, 2**63, 10**40),
    "top_p": (5e-324, 1e-50, 1e-46, 1e-39, 1e-8, 0.5, 1 - 2**-53, 1),
    "min_p": (0, 5e-324, 1e-50, 1e-39, 0.5, 1 - 2**-53, 1),
    "repetition_penalty": (5e-324, 1e-50, 1e-39, 1e-30, 0.01, 1, 1 + 2**-52, 100),
    "seed": (-(2**63), -1, 0, 2**64, 10**4000),
    "max_tokens": (0, 1, 3),
    "logprobs": (None, False, 0, 1, 20),
    "echo": (None, False, True),
    "prompt": ("", "\0\uffff", "<eos>", "é" * 50, [], [[]], [[5, 300], [2]], [1, 0, 3], ["", "x"]),
    "stop": (None, [], "\0", ["a" * 256] * 16),
    "n": (None, 1, 2),
}
# Of OpenAI's, vLLM's and llama.cpp's clients, and of those to come.
MEANS_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens", "mirostat"), (0, 0.0)),
    **dict.fromkeys(("length_penalty", "repeat_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("use_beam_search", "ignore_eos", "early_stopping", "echo"), (False,)),
    **dict.fromkeys(("add_special_tokens", "skip_special_tokens", "stream_options"), (None,)),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), (None,)),
    **dict.fromkeys(
        ("response_format", "max_completion_tokens", "truncate_prompt_tokens"), (None,)
    ),
    "top_k": (-1, 0, None),
    "min_p": (0, None),
    "stop": ([], None),
    "stop_token_ids": ([], None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "n": (1, None),
    "logprobs": (None, False),
    **dict.fromkeys(("mirostat_tau", "dry_base", "repeat_last_n", "xtc_threshold"), (0, 5.0, None)),
    "id_slot": (-1, None),
    "t_max_predict_ms": (0, None),
    "stream": (False, None),
    "skip_special_tokens": (True, None),
    "of_next_year": (None, False, 0, "", [], {}),
    "user": ("", "iemand", None),
}
UNSUPPORTED = [
    ({"frequency_penalty": 0.5}, "frequency_penalty: 0.5", "repetition_penalty"),
    ({"presence_penalty": -1}, "presence_penalty: -1", "repetition_penalty"),
    ({"logit_bias": {"5": 100}}, "logit_bias: {'5': 100}", "temperature"),
    ({"suffix": "x" * 1000}, "suffix: xxx", "prompt"),
    ({"best_of": 3}, "best_of: 3", "n, "),
    ({"ignore_eos": True}, "ignore_eos: True", "max_tokens"),
    ({"skip_special_tokens": False}, "skip_special_tokens: False", "stop"),
    ({"guided_json": {"a": 1}}, "guided_json", "prompt"),
    ({"response_format": {"type": "json_object"}}, "response_format", "prompt"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages", "prompt"),
    ({"n_predict": 8}, "n_predict: 8", "max_tokens"),
    ({"t_max_predict_ms": 5}, "t_max_predict_ms: 5", "max_tokens"),
    ({"prompt_logprobs": 1}, "prompt_logprobs: 1", "echo, logprobs"),
    ({"temperature": 101}, "temperature: Expected `float`", "<= 100"),
    ({"top_p": 0}, "top_p: Expected `float`", "> 0"),
    ({"top_k": -2}, "top_k: Expected `int`", ">= -1"),
    ({"max_tokens": -1}, "max_tokens: Expected `int` >= 0", "max_tokens"),
    ({"logprobs": True}, "logprobs: Expected `int", "got `bool`"),
    ({"temprature": 1}, "temprature: 1", "temperature"),
    ({"stream_options": {"x": 1}}, "stream_options: ", "unknown field `x`"),
    ({"model": "m" * 1000}, "model mmm", "here"),
]


@pytest.fixture(scope="module")
def model(trained_run: Path) -> str:
    return str(trained_run / "final_model")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def server(model: str, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with serving_here(load_for_inference(model, request.param, "none")) as running:
        yield running


def post(connection: HTTPConnection, body: bytes) -> tuple[int, Any]:
    """Sends a body over a connection that stays, and returns status and JSON."""
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@contextlib.contextmanager
def unharmed(server: RunningServer) -> Iterator[HTTPConnection]:
    """Gives a connection, and checks that afterwards the server is as it was before."""
    asked: dict[str, Any] = {**BASE, "max_tokens": 8}
    before = server.complete(**asked)[1]["choices"]
    with contextlib.closing(HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        yield connection
    wait_until(lambda: server.metric("kiem_sequences_running") == 0)
    assert server.metric("kiem_sequences_waiting") == 0
    with ThreadPoolExecutor(3) as company:  # more than there are slots
        after = list(company.map(lambda _: server.complete(**asked), range(3)))
    assert [answer["choices"] for _, answer in after] == [before] * 3
    assert server.ask("GET", "/health")[0] == 200


def test_any_value_of_any_field(server: RunningServer) -> None:
    with unharmed(server) as client:
        for name in (*CompletionBody.__struct_fields__, "guided_json", "unknown", ""):
            for value in VALUES:
                rest = json.dumps({key: BASE[key] for key in BASE if key != name})
                body = f'{{"{name}": {value}, {rest[1:]}'
                if name == "stream" and value == "true":
                    continue
                status, answer = post(client, body.encode())
                assert status in (200, 400, 404), (body, answer)
                if status == 200:
                    assert answer["choices"], body
                else:
                    assert answer["error"]["message"], body
                    assert len(json.dumps(answer)) < 1000, body


def test_what_is_in_range_works_at_every_extreme(server: RunningServer) -> None:
    """Each by itself, then seeded mixtures of all."""
    chance = random.Random(19)
    asked: list[dict[str, Any]] = [{n: v} for n, values in IN_RANGE.items() for v in values]
    for _ in range(300):
        names = chance.sample(list(IN_RANGE), chance.randint(2, len(IN_RANGE)))
        asked.append({name: chance.choice(IN_RANGE[name]) for name in names})
    with unharmed(server) as client:
        for given in asked:
            body = {**BASE, **given}
            status, answer = post(client, json.dumps(body).encode())
            possible = 400 if body["prompt"] == [] else 200
            assert status == possible, (given, answer)
            for told in (
                choice["logprobs"] for choice in answer.get("choices", []) if status == 200
            ):
                assert (told is not None) == (type(body.get("logprobs")) is int)
                if told is not None:
                    assert len({len(entries) for entries in told.values()}) == 1, told
                    known = [p for p in told["token_logprobs"] if p is not None]
                    assert all(-1000 < p <= 0 for p in known)
                    assert len(told["tokens"]) - len(known) in (
                        (0, 1) if body.get("echo") else (0,)
                    )


def test_a_temperature_too_small_to_divide_by_is_none(server: RunningServer) -> None:
    def text(temperature: float) -> str:
        _, answer = server.complete(**{**BASE, "max_tokens": 20, "temperature": temperature})
        return str(answer["choices"][0]["text"])

    assert text(0) == text(-0.0) == text(1e-50) == text(1.17e-38) == text(1.18e-38) == text(1e-9)


def test_the_largest_strings(server: RunningServer) -> None:
    with unharmed(server) as client:
        for name in ("prompt", "stop", "model", "user", "suffix", "unknown"):
            for letter in ("a", "-", " ", "\0", "é"):
                value = letter * (MEGABYTE // len(json.dumps(letter)[1:-1]))
                status, answer = post(client, json.dumps({**BASE, name: value}).encode())
                assert status in ((200,) if name == "user" else (400, 404)), (name, letter)
                assert len(json.dumps(answer)) < 1000


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"x"', 400),
        (b'{"prompt": "x"', 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"\xff": "x"}', 400),
        (b'\xef\xbb\xbf{"prompt": "x"}', 400),
        ('{"prompt": "x"}'.encode("utf-16"), 400),
        (b"[" * 500_000, 400),
        (b'{"prompt":' * 100_000, 400),
        *((b'{"guided_json": ' + b"[" * n + b"]" * n + b"}", 400) for n in range(50, 1100, 150)),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 900_000 + b"}", 400),
        (b'{"prompt": "x", "prompt": "y", "max_tokens": 1}', 200),
        (b'{"prompt": "x", "max_tokens": 1}' + b" " * 900_000, 200),
        (b" " * (1 << 20) + b" ", 413),
    ],
)
def test_bodies(server: RunningServer, body: bytes, status: int) -> None:
    """As a whole, and in chunks; each also cut off by a client that leaves."""
    with unharmed(server) as client:
        assert post(client, body)[0] == status
        client.close()
        kind = {"content-type": "application/json"}
        parts = [body[: len(body) // 2], body[len(body) // 2 :]]
        client.request(
            "POST", "/v1/completions", iter(filter(None, parts)), kind, encode_chunked=True
        )
        assert client.getresponse().status == status
        for head in (
            b"Content-Length: %d\r\n\r\n" % (len(body) + 1),
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (len(body) + 1),
        ):
            with socket.create_connection(("127.0.0.1", server.port)) as leaves:
                leaves.sendall(HEAD + head + body[: 1 << 19])


@pytest.mark.parametrize("name", MEANS_OFF)
def test_off_is_taken_as_off(server: RunningServer, name: str) -> None:
    without = server.complete(**BASE)[1]["choices"]
    for value in MEANS_OFF[name]:
        status, answer = server.complete(**{**BASE, name: value})
        assert (status, answer.get("choices")) == (200, without), (value, answer)


@pytest.mark.parametrize(("given", "what", "works"), UNSUPPORTED)
def test_what_is_not_supported_says_so(
    server: RunningServer, given: dict[str, Any], what: str, works: str
) -> None:
    status, answer = server.complete(**{**BASE, **given})
    error = answer["error"]
    assert status in (400, 404)
    assert error["param"] == next(iter(given))
    assert what in error["message"]
    assert works in error["message"]
    assert len(error["message"]) < 300


def test_the_openai_client_with_all_that_is_off(server: RunningServer) -> None:
    off = {name: values[0] for name, values in MEANS_OFF.items()}
    own = {"frequency_penalty", "presence_penalty", "stop", "logit_bias", "best_of", "suffix", "n"}
    given: dict[str, Any] = {name: value for name, value in off.items() if name in own}
    given["extra_body"] = {name: value for name, value in off.items() if name not in own}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        answer = client.completions.create(model="here", **BASE, **given)
        assert answer.choices[0].text == server.complete(**BASE)[1]["choices"][0]["text"]
        with pytest.raises(openai.NotFoundError, match=r"/v1/completions.*no chats") as chat:
            client.chat.completions.create(
                model="here", messages=[{"role": "user", "content": "x"}]
            )
        assert chat.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError, match="POST /v1/completions"):
            client.embeddings.create(model="here", input="x")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("POST", f"/v1/{path}", 404) for path in ("responses", "audio/speech", "edits", "")),
        *(("GET", path, 404) for path in ("/v1", "/v1/completions/", "/%ff%00", "/x" * 2000, "//")),
        ("GET", "/v1/completions", 405),
        *((method, "/health", 405) for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW")),
        *(("HEAD", path, 200) for path in ("/", "/health", "/v1/models", "/metrics")),
        ("GET", "/v1/models/" + "m" * 2000, 404),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_paths_and_methods(
    server: RunningServer, method: str, path: str, status: int
) -> None:
    found, _, text = server.ask(method, path, {} if method == "POST" else None)
    assert found == status
    if status == 200:
        assert text == ""
    else:
        error = json.loads(text)["error"]
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 300


def test_a_client_that_says_nothing(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It, and one that stops in the middle of a line or body, lose the connection."""
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 0.5)
    with contextlib.ExitStack() as stack:
        address = "127.0.0.1", server.port
        silent = [stack.enter_context(socket.create_connection(address, 30)) for _ in range(20)]
        for each in silent[:10]:
            each.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert each.recv(4096).endswith(b'{"status":"ok"}')
        for each in silent[5:12]:
            each.sendall(b"POST /v1/comple")
        for each in silent[12:15]:
            each.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt": ')
        connected = stack.enter_context(unharmed(server))
        assert [each.recv(1) for each in silent[5:]] == [b""] * 15
        assert post(connected, json.dumps(BASE).encode())[0] == 200


def test_a_client_that_does_not_read(server: RunningServer) -> None:
    body = {**BASE, **ENDLESS, "max_tokens": 1000, "logprobs": 20, "stream": True}
    data = json.dumps(body).encode()
    with unharmed(server), socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        wait_until(lambda: server.metric("kiem_sequences_running") == 1)
        assert server.complete(**BASE)[0] == 200
        wait_until(lambda: server.metric("kiem_sequences_running") == 0)
        assert server.complete(**BASE)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status", "what"),
    [
        ({"content-type": "text/plain"}, 415, "application/json"),
        ({"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c"}, 200, "choices"),  # Java's
        ({"connection": "upgrade", "upgrade": "websocket"}, 200, "choices"),
        ({"expect": "100-continue"}, 200, "choices"),
        ({"accept-encoding": "br;q=1, *;q=0", "accept": "text/plain"}, 200, "choices"),
    ],
)
def test_headers_of_clients(
    server: RunningServer,
    caplog: pytest.LogCaptureFixture,
    headers: dict[str, str],
    status: int,
    what: str,
) -> None:
    found, _, text = server.ask("POST", "/v1/completions", BASE, headers)
    assert found == status
    assert what in text
    assert not caplog.records
