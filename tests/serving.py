"""A server in a process of its own, as people start it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from conftest import ROOT


class ServerProcess:
    """A running `inference.py --serve`.

    Attributes:
        url: where it listens.
        port: the same.
        process: it.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        assert process.stdout is not None
        line = ""
        while " is at " not in line:
            line = process.stdout.readline()
            assert line, "the server did not start"
        found = re.search(r"at (http://\S+:(\d+))/", line)
        assert found
        self.url, self.port = found[1], int(found[2])

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
