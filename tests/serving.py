"""Servers to ask: in a process of their own, as people start them, and in this one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from kiem.config import InferenceOptions
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import SamplingParams
from kiem.inference.server.serve import make_server, prepare_server

# So repetitive that the model never ends its text.
ENDLESS = {"temperature": 0, "repetition_penalty": 0.5}
# With the headers that nginx sends by itself, but in the last place.
NGINX = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream kiem_backend {{ server 127.0.0.1:{server}; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://127.0.0.1:{server}; }}
        location /kiem/ {{ proxy_pass http://127.0.0.1:{server}/; }}
        location /named/ {{ proxy_pass http://kiem_backend/; }}
        location /as-asked/ {{
            proxy_set_header Host $host;
            proxy_pass http://kiem_backend/;
        }}
    }}
}}
"""


class RunningServer:
    """A server that listens.

    Attributes:
        url: where.
        port: the same.
    """

    def __init__(self, port: int):
        self.url, self.port = f"http://127.0.0.1:{port}", port

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Sends one request and returns status, headers (lower case) and body."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"content-type": "application/json", **(headers or {})}
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read().decode()

    def complete(self, **body: Any) -> tuple[int, Any]:
        """Asks /v1/completions and returns status and JSON."""
        status, _, text = self.ask("POST", "/v1/completions", body)
        return status, json.loads(text)

    def metric(self, name: str) -> float:
        """Returns a figure of /metrics, 0 if it is not there yet."""
        _, _, text = self.ask("GET", "/metrics")
        values = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(values[0]) if values else 0.0


class ServerProcess(RunningServer):
    """A running `inference.py --serve`.

    Attributes:
        process: it.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        assert process.stdout is not None
        line = ""
        while " is at " not in line:
            line = process.stdout.readline()
            if not line:
                _, errors = process.communicate()
                raise AssertionError(f"the server did not start: {errors}")
        found = re.search(r"at http://\S+:(\d+)/", line)
        assert found
        super().__init__(int(found[1]))


@contextlib.contextmanager
def serving_here(loaded: LoadedModel, **options: Any) -> Iterator[RunningServer]:
    """Runs a server in a thread: quick to start, and its model can be given faults."""
    given = InferenceOptions("here", serve=True, port=0, **{"max_requests": 2, **options})
    server, worker = make_server(loaded, SamplingParams(), given)
    with prepare_server(given) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield RunningServer(listening.getsockname()[1])
            assert thread.is_alive()
        finally:
            server.should_exit = True
            thread.join()
            worker.stop()


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[ServerProcess]:
    """Starts a server on any free port, and checks that it ends well when told to."""
    words = ["inference.py", "--model-path", str(model), "--serve", "--port", "0", *options]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield ServerProcess(process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "The server has ended." in output
        assert "Traceback" not in errors, errors
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def nginx_before(server: RunningServer, folder: Path) -> Iterator[RunningServer]:
    """Puts an nginx before a server, with its files in `folder`; skips the test without nginx."""
    program = shutil.which("nginx", path=os.environ["PATH"] + os.pathsep + "/usr/sbin")
    if program is None:
        message = "nginx is not there; install it with: apt-get install nginx-light"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    errors, configuration = folder / "error.log", folder / "nginx.conf"
    configuration.write_text(NGINX.format(folder=folder, server=server.port, port=port))
    process = subprocess.Popen([program, "-e", errors, "-c", configuration])

    def listens() -> bool:
        assert process.poll() is None, errors.read_text()
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens)
        yield RunningServer(port)
    finally:
        process.terminate()
        process.wait(timeout=60)


def open_stream(server: RunningServer, max_tokens: int = 3000) -> tuple[HTTPConnection, Any]:
    """Begins a long stream and reads its first line."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": "De", "max_tokens": max_tokens, "stream": True, "seed": 1, **ENDLESS}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status == 200:
        assert answer.readline().startswith(b"data: ")
    return connection, answer


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns when a condition holds; fails after half a minute."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
