"""The start and end of the server: from options to a server that runs until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
from pathlib import Path

import uvicorn
from rich.console import Console
from uvicorn.protocols.http.h11_impl import H11Protocol

from kiem.config import InferenceOptions
from kiem.core.errors import bad_option
from kiem.inference.engine import Engine
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import SamplingParams
from kiem.inference.server.access import is_loopback
from kiem.inference.server.app import Server
from kiem.inference.server.completions import ServerSettings
from kiem.inference.server.worker import Worker

REQUEST_SECONDS = 30
_STOP_SECONDS = 30  # for running requests to end
_STRONG_KEY = "[!-~]{16,}"  # ASCII without spaces
_MOST_CONNECTIONS = 500


class _Connection(H11Protocol):
    """A client's connection, closed if its next request does not come in time.

    Uvicorn itself would wait forever for the first request, and for the rest of one that has
    begun. Its connections are limited, so silent clients could keep all others out.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def _update_deadline(self) -> None:
        """Ends the time limit if a whole request has come; else it stays as it was."""
        is_waiting = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        if is_waiting and self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.close)
        elif not is_waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _should_upgrade(self) -> bool:
        """Ignores requests for another protocol, as HTTP allows: some clients send many."""
        return False


def prepare_server(options: InferenceOptions) -> socket.socket:
    """Checks the key and binds the address, before a model is loaded.

    Raises:
        UserError: the key is too weak, or the address cannot be bound.
    """
    host, port = options.host, options.port
    _check_key(host, options.api_key)
    is_v6 = ":" in host
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=is_v6)
    except (OSError, ValueError) as error:  # the latter: not even a name, or no IPv6 here
        what = f"cannot listen there ({getattr(error, 'strerror', None) or error})"
        where = f"--host {host} --port {port}"
        raise bad_option(where, what, "Choose another --port or --host.") from error


def _check_key(host: str, api_key: str | None) -> None:
    """Checks that a server that others can reach has a key that cannot be guessed."""
    if api_key is None and not is_loopback(host):
        what = f"others can reach a server on {host}: it needs a key"
    elif api_key is not None and not re.fullmatch(_STRONG_KEY, api_key):
        what = "the key must have at least 16 characters, all of them ASCII and no spaces"
    else:
        return
    fix = "Make one with: openssl rand -hex 16. In a file for --config nobody else sees it."
    raise bad_option("--api-key", what, fix)


def serve(
    loaded: LoadedModel,
    params: SamplingParams,
    options: InferenceOptions,
    listening: socket.socket,
    console: Console,
) -> None:
    """Serves until SIGINT (Ctrl-C) or SIGTERM, after which running requests may still end.

    Requests have the defaults `params`; `listening` is the socket of `prepare_server`.
    """
    server, worker = make_server(loaded, params, options)
    loaded.tokenizer.encode("")  # Gemma's takes a second to load: not at the first request
    # uvicorn raises the signal that has stopped it once more: that is no error here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    logging.getLogger("uvicorn.error").addFilter(_is_error)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    name = _model_name(options.model_path)
    console.print(f"{name} is at http://{shown}:{port}/ (Ctrl-C ends it)")
    try:
        server.run([listening])
    finally:
        worker.stop()
    console.print("The server has ended.")


def _is_error(record: logging.LogRecord) -> bool:
    """Returns whether uvicorn logs more than the cancellation of tasks at its end."""
    is_end = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_end and "CancelledError" not in record.getMessage()


def make_server(
    loaded: LoadedModel, params: SamplingParams, options: InferenceOptions
) -> tuple[uvicorn.Server, Worker]:
    """Returns a server that is yet to run, and its engine's thread; arguments as of `serve`."""
    max_requests, max_context = options.max_requests, options.max_context
    max_sequences = max_requests + options.max_waiting
    settings = ServerSettings(_model_name(options.model_path), params, max_context, max_sequences)
    engine = Engine(
        loaded.model, loaded.tokenizer, max_requests=max_requests, max_tokens=max_context
    )
    worker = Worker(engine, max_sequences)

    def end() -> None:
        server.should_exit = True

    app = Server(worker, settings, loaded.tokenizer).app(options.api_key, end)
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    server = uvicorn.Server(config)
    return server, worker


def _model_name(given: str) -> str:
    """Returns what clients call the model: its Hub id, or its run's or folder's name.

    A link such as ...-latest keeps its own name, which clients may rely on.
    """
    if not Path(given).is_dir():
        return given
    folder = Path(given).absolute() if ".." not in Path(given).parts else Path(given).resolve()
    return folder.parent.name if folder.name == "final_model" else folder.name
