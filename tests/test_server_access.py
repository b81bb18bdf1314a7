"""The server's beginning and end, and who may use it in between."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import ROOT
from rich.console import Console
from safetensors.torch import load_file, save_file
from serving import ServerProcess, open_stream, serving, wait_until

from kiem.config import InferenceOptions
from kiem.core.errors import ExitCode, UserError
from kiem.inference.generate import generate

KEY = "een-sleutel-van-lengte"
ROUTES = ("/", "/page.js", "/metrics", "/v1/models", "/niets")


@pytest.fixture(scope="module")
def model(trained_run: Path) -> Path:
    return trained_run / "final_model"


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    with serving(model) as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost"}, 200),
        ({"host": "LOCALHOST:9"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "kwaad.example"}, 403),
        ({"host": "127.0.0.1.kwaad.example"}, 403),
        ({"host": "localhost.kwaad.example:8000"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:1", "origin": "http://localhost:1"}, 200),
        ({"host": "localhost:1", "origin": "http://localhost:2"}, 403),
        ({"host": "localhost:1", "origin": "https://kwaad.example"}, 403),
        ({"host": "localhost:1", "origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_are_kept_out(
    server: ServerProcess, headers: dict[str, str], status: int
) -> None:
    found, answered, _ = server.ask("GET", "/v1/models", None, headers)
    assert found == status
    assert not [name for name in answered if name.startswith("access-control")]
    assert answered["content-security-policy"].startswith("default-src 'none'")


def test_the_key_is_asked_for_on_every_route(model: Path) -> None:
    basic = base64.b64encode(f"wie:{KEY}".encode()).decode()
    wrong = base64.b64encode(b"wie:dan").decode()
    with serving(model, "--host", "0.0.0.0", "--api-key", KEY) as server:
        for route in ROUTES:
            expected = 404 if route == "/niets" else 200
            for refused in ({}, {"authorization": "Bearer x"}, {"authorization": KEY}):
                status, headers, _ = server.ask("GET", route, None, refused)
                assert status == 401
                assert headers["www-authenticate"].startswith("Basic ")
            given = {"authorization": f"Bearer {KEY}"}
            assert server.ask("GET", route, None, given)[0] == expected
        for secret, status in ((basic, 200), (wrong, 401), ("%%%", 401), ("\xe9", 401), ("", 401)):
            given = {"authorization": f"Basic {secret}"}
            assert server.ask("GET", "/v1/models", None, given)[0] == status
        for probe in ({}, {"host": "10.1.2.3:8000"}, {"authorization": "Bearer x"}):
            status, _, body = server.ask("GET", "/health", None, probe)
            assert (status, json.loads(body)) == (200, {"status": "ok"})
            status, _, body = server.ask("HEAD", "/health", None, probe)
            assert (status, body) == (200, "")
            assert server.ask("POST", "/health", {}, probe)[0] == 405
        assert server.complete(prompt="x")[0] == 401
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY) as client:
            assert client.completions.create(model="short", prompt="De", max_tokens=2).choices
        with (
            openai.OpenAI(base_url=url, api_key="x") as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()


def test_running_requests_may_end_when_the_server_is_stopped(model: Path) -> None:
    with serving(model) as server:
        connection, answer = open_stream(server, max_tokens=500)
        server.process.send_signal(signal.SIGTERM)
        rest = answer.read().decode()
        connection.close()
        assert rest.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in rest
        assert server.process.wait(timeout=60) == 0


def test_a_second_ctrl_c_waits_for_nobody(model: Path) -> None:
    with serving(model) as server:
        connection, answer = open_stream(server)

        def is_ending() -> bool:
            with socket.socket() as tried:
                return tried.connect_ex(("127.0.0.1", server.port)) != 0

        server.process.send_signal(signal.SIGINT)
        wait_until(is_ending)
        assert answer.readline() == b"\n"  # it goes on
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(IncompleteRead, ConnectionError):
            assert not answer.read().endswith(b"[DONE]\n\n")
        connection.close()


def test_a_model_that_is_no_more_ends_the_server(model: Path, tmp_path: Path) -> None:
    """Its weights are not numbers: the client is told, the program says why it ends."""
    shutil.copytree(model, tmp_path / "broken", ignore=shutil.ignore_patterns("manifest.json"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    words = ("inference.py", "--serve", "--port", "0", "--model-path", tmp_path / "broken")
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        server = ServerProcess(process)
        status, answer = server.complete(prompt="De")
        assert status == 503
        assert answer["error"]["type"] == "server_error"
        _, errors = process.communicate(timeout=60)
    assert process.returncode == ExitCode.NOT_FINITE
    assert "the model's output is not a number" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "needs a key"),
        ({"host": "example.org"}, "needs a key"),
        ({"host": "0.0.0.0", "api_key": "kort"}, "at least 16 characters"),
        ({"api_key": "een sleutel met spaties"}, "no spaces"),
        ({"host": "192.0.2.1", "api_key": KEY}, "cannot listen there"),
        ({"max_context": 100}, "above --max-new-tokens"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as found:
        generate(InferenceOptions("nergens", serve=True, **options), Console(quiet=True))
    assert found.value.exit_code == ExitCode.BAD_OPTION


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("kiem.inference.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.types", None)  # as if it were not installed
    with pytest.raises(UserError, match="needs starlette uvicorn prometheus-client"):
        generate(InferenceOptions("nergens", serve=True), Console(quiet=True))


def test_a_port_in_use_is_told() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match="Address already in use"),
    ):
        port = taken.getsockname()[1]
        generate(InferenceOptions("nergens", serve=True, port=port), Console(quiet=True))
