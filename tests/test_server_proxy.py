"""Behind a reverse proxy: a real nginx, with the headers that it sends by itself."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serving import RunningServer, nginx_before, serving_here

from kiem.inference.loading import load_for_inference

KEY = "een-sleutel-van-lengte"
BASIC = "Basic " + base64.b64encode(f"wie:{KEY}".encode()).decode()
PLACES = ("/", "/kiem/", "/named/", "/as-asked/")


class Gate:
    """Lets a model write no more than two tokens until it is opened."""

    def __init__(self, model: torch.nn.Module):
        self.opened = threading.Event()
        self.opened.set()
        self._num_passes = 0
        model.register_forward_hook(self._pass)

    def close(self) -> None:
        self.opened.clear()
        self._num_passes = 0

    def _pass(self, *_: object) -> None:
        self._num_passes += 1
        assert self._num_passes <= 2 or self.opened.wait(60)


@pytest.fixture(scope="module")
def gate_and_server(trained_run: Path) -> Iterator[tuple[Gate, RunningServer]]:
    loaded = load_for_inference(str(trained_run / "final_model"), "fp32")
    gate = Gate(loaded.model.model.norm)
    with serving_here(loaded, api_key=KEY) as running:
        yield gate, running


@pytest.fixture(scope="module")
def server(gate_and_server: tuple[Gate, RunningServer]) -> RunningServer:
    return gate_and_server[1]


@pytest.fixture(scope="module")
def nginx(
    server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with nginx_before(server, tmp_path_factory.mktemp("nginx")) as running:
        yield running


def browser(nginx: RunningServer, site: str | None = "same-origin") -> dict[str, str]:
    """Returns what a browser sends with what a page asks; old ones say nothing of the site."""
    told = {"sec-fetch-site": site} if site else {}
    return {"authorization": BASIC, "origin": nginx.url, **told}


@pytest.mark.parametrize("place", PLACES)
def test_the_page_works(nginx: RunningServer, place: str) -> None:
    status, _, page = nginx.ask("GET", place, None, {"authorization": BASIC})
    assert status == 200
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert {"page.js", "page.css", "icon.svg"} <= set(links)
    for link in links:
        assert nginx.ask("GET", place + link, None, browser(nginx))[0] == 200
    script = nginx.ask("GET", place + "page.js", None, browser(nginx))[2]
    (target,) = re.findall(r'fetch\("([^"]*)"', script)
    for site in ("same-origin", None):
        asked = {"prompt": "De", "max_tokens": 2}
        status, _, text = nginx.ask("POST", place + target, asked, browser(nginx, site))
        assert (status, len(json.loads(text)["choices"])) == (200, 1), text
    with openai.OpenAI(base_url=f"{nginx.url}{place}v1", api_key=KEY, max_retries=0) as client:
        stream = client.completions.create(model="here", prompt="De", max_tokens=4, stream=True)
        assert list(stream)[-1].choices[0].finish_reason


@pytest.mark.parametrize("place", PLACES)
def test_strangers_stay_out(nginx: RunningServer, place: str) -> None:
    """No key, a wrong one, and another site whose page the browser gives the key."""
    target = place + "v1/completions"
    for authorization in (None, "Bearer x", "Basic eDp5"):
        given = {"authorization": authorization} if authorization else {}
        assert nginx.ask("POST", target, {"prompt": "De"}, given)[0] == 401
        assert nginx.ask("GET", place, None, given)[0] == 401
    for site in ("cross-site", "same-site"):
        given = {**browser(nginx, site), "origin": "https://kwaad.example"}
        status, headers, text = nginx.ask("POST", target, {"prompt": "De"}, given)
        assert (status, json.loads(text)["error"]["type"]) == (403, "permission_error")
        assert not [name for name in headers if name.startswith("access-control")]
    # What a page can send without asking first is no JSON, and asking is refused.
    given = {"authorization": BASIC, "origin": "https://kwaad.example"}
    assert nginx.ask("POST", target, b"{}", {**given, "content-type": "text/plain"})[0] == 415
    assert nginx.ask("OPTIONS", target, None, given)[0] == 405
    # A link on another site may lead here.
    link = {"authorization": BASIC, "sec-fetch-site": "cross-site"}
    assert nginx.ask("GET", place, None, link)[0] == 200


def test_a_stream_is_not_held_back(
    nginx: RunningServer, gate_and_server: tuple[Gate, RunningServer]
) -> None:
    gate, server = gate_and_server
    body = json.dumps({"prompt": "De", "max_tokens": 5, "stream": True})
    headers = {"content-type": "application/json", "authorization": BASIC}
    for asked in (server, nginx):
        gate.close()
        connection = HTTPConnection("127.0.0.1", asked.port, timeout=30)
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        if asked is server:  # nginx keeps it to itself
            assert answer.headers["x-accel-buffering"] == "no"
        assert answer.readline().startswith(b"data: {")
        gate.opened.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()


def test_probes_need_no_key(nginx: RunningServer, server: RunningServer) -> None:
    for asked in (nginx, server):
        for host in ("10.1.2.3:8000", "kiem_backend", "kwaad.example"):
            status, headers, text = asked.ask("GET", "/health", None, {"host": host})
            assert (status, json.loads(text)) == (200, {"status": "ok"})
            assert "here" not in str(headers)
            assert asked.ask("HEAD", "/health", None, {"host": host})[0] == 200
    assert server.ask("GET", "/health/", None)[0] == 401
    assert server.ask("GET", "//health", None)[0] == 401


def test_without_a_key_a_proxy_is_told_what_it_needs(trained_run: Path) -> None:
    loaded = load_for_inference(str(trained_run / "final_model"), "fp32")
    asked: dict[str, Any] = {"prompt": "De", "max_tokens": 1}
    with serving_here(loaded) as server:
        own = f"127.0.0.1:{server.port}"
        for headers in (
            {"host": "kiem_backend"},
            {"host": "kwaad.example", "origin": "http://kwaad.example"},
            {"host": own, "origin": "https://kiem.example"},
            {"host": own, "origin": "https://kiem.example", "sec-fetch-site": "same-origin"},
        ):
            status, _, text = server.ask("POST", "/v1/completions", asked, headers)
            assert (status, "--api-key" in text) == (403, True)
        given = {"host": own, "origin": f"http://{own}"}
        assert server.ask("POST", "/v1/completions", asked, given)[0] == 200
