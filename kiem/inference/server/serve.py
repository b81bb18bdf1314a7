"""The start and end of the server: from options to a server that runs until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kiem.config import InferenceOptions
from kiem.core.errors import bad_option, not_installed
from kiem.inference.engine import Engine
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import SamplingParams

if TYPE_CHECKING:
    import uvicorn

    from kiem.inference.server.worker import Worker

_STOP_SECONDS = 30  # for running requests to end
_SHORTEST_KEY = 16
_MOST_CONNECTIONS = 500


@contextlib.contextmanager
def prepare_server(options: InferenceOptions) -> Iterator[socket.socket]:
    """Checks packages and key, and binds the address, all before a model is loaded.

    Raises:
        UserError: a package is missing, the key is too weak, or the address cannot be bound.
    """
    for package in ("starlette", "uvicorn", "prometheus_client"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise not_installed("starlette uvicorn prometheus-client", "--serve") from error
    _check_key(options.host, options.api_key)
    with open_socket(options.host, options.port) as listening:
        yield listening


def _check_key(host: str, api_key: str | None) -> None:
    """Checks that a server that others can reach has a key that cannot be guessed."""
    from kiem.inference.server.access import is_loopback

    if api_key is None:
        if is_loopback(host):
            return
        what = f"others can reach a server on {host}: it needs a key"
    elif len(api_key) < _SHORTEST_KEY or not api_key.isascii() or not api_key.isprintable():
        what = f"the key must have at least {_SHORTEST_KEY} characters, all of them ASCII"
    elif " " in api_key:
        what = "the key has a space"
    else:
        return
    fix = "Make one with: openssl rand -hex 16. In a file for --config nobody else sees it."
    raise bad_option("--api-key", what, fix)


@contextlib.contextmanager
def open_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Binds an address.

    Raises:
        UserError: there is no such address here, or it is in use.
    """
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, _, _, address = found[0]
            listening = stack.enter_context(socket.socket(family, kind))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except (OSError, UnicodeError) as error:
            what = f"cannot listen there ({getattr(error, 'strerror', None) or error})"
            where = f"--host {host} --port {port}"
            raise bad_option(where, what, "Choose another --port or --host.") from error
        yield listening


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
    listening.listen()
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn raises the signal that has stopped it once more: that is no error here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    logging.getLogger("uvicorn.error").addFilter(_is_error)
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
    import uvicorn

    from kiem.inference.server.app import Server
    from kiem.inference.server.completions import ServerSettings
    from kiem.inference.server.connection import Connection
    from kiem.inference.server.worker import Worker

    settings = ServerSettings(
        model=_model_name(options.model_path),
        params=params,
        max_context=options.max_context,
        max_sequences=options.max_requests + options.max_waiting,
    )
    max_requests, max_tokens = options.max_requests, options.max_context
    engine = Engine(
        loaded.model, loaded.tokenizer, max_requests=max_requests, max_tokens=max_tokens
    )
    worker = Worker(engine, settings.max_sequences)

    def end() -> None:
        server.should_exit = True

    app = Server(worker, settings, loaded.tokenizer).app(options.api_key, end)
    config = uvicorn.Config(
        app,
        http=Connection,
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
