"""inference.py --serve: from options to a server that runs until it is told to stop."""

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
from kiem.core.errors import ExitCode, UserError, not_installed
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import Sampling
from kiem.inference.streaming import Writer

if TYPE_CHECKING:
    import uvicorn

    from kiem.inference.server.worker import Worker

# Requests that run when the server is told to stop have so long to end.
_STOP_SECONDS = 30
_SHORTEST_KEY = 16
_MOST_CONNECTIONS = 500


def check_packages() -> None:
    """Checks that what a server needs is installed, before a model is loaded.

    Raises:
        UserError: it is not.
    """
    for package in ("starlette", "uvicorn", "prometheus_client"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise not_installed("starlette uvicorn prometheus-client", "--serve") from error


def check_key(host: str, api_key: str | None) -> None:
    """Checks that a server that others can reach has a key, and that it is worth its name.

    Raises:
        UserError: it has none, or one that can be guessed or not be sent.
    """
    from kiem.inference.server.guard import is_loopback

    if api_key is None and is_loopback(host):
        return
    if api_key is None:
        what = f"others can reach a server on {host}: it needs a key"
    elif len(api_key) < _SHORTEST_KEY or not api_key.isascii() or not api_key.isprintable():
        what = f"the key must have at least {_SHORTEST_KEY} characters, all of them ASCII"
    elif " " in api_key:
        what = "the key has a space"
    else:
        return
    raise UserError(
        what,
        where="--api-key",
        fix="Make one with: openssl rand -hex 16. In a file for --config nobody else sees it.",
        exit_code=ExitCode.BAD_OPTION,
    )


@contextlib.contextmanager
def open_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Takes an address, so that a model is not loaded in vain when it is taken.

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
            raise UserError(
                f"cannot listen there ({getattr(error, 'strerror', None) or error})",
                where=f"--host {host} --port {port}",
                fix="Choose another --port or --host.",
                exit_code=ExitCode.BAD_OPTION,
            ) from error
        yield listening


def serve(
    loaded: LoadedModel,
    sampling: Sampling,
    options: InferenceOptions,
    listening: socket.socket,
    console: Console,
) -> None:
    """Serves until SIGINT (Ctrl-C) or SIGTERM, after which running requests may still end.

    Args:
        loaded: the model.
        sampling: how tokens are chosen where a request does not say.
        options: all options of inference.py.
        listening: from `open_socket`.
        console: where the address is shown.
    """
    server, worker = make_server(loaded, sampling, options)
    loaded.tokenizer.encode("")  # Gemma's loads for a second: not at the first request
    listening.listen()
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn raises the signal that it stopped for once more: that is no mistake here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    logging.getLogger("uvicorn.error").addFilter(_is_more_than_an_end)
    name = _model_name(options.model_path)
    console.print(f"{name} is at http://{shown}:{port}/ (Ctrl-C ends it)")
    try:
        server.run([listening])
    finally:
        worker.stop()
    console.print("The server has ended.")


def _is_more_than_an_end(record: logging.LogRecord) -> bool:
    """Says whether uvicorn logs more than that a second Ctrl-C or `_STOP_SECONDS` ended a task."""
    is_end = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_end and "CancelledError" not in record.getMessage()


def make_server(
    loaded: LoadedModel, sampling: Sampling, options: InferenceOptions
) -> tuple[uvicorn.Server, Worker]:
    """Returns a server that is yet to run, and its engine's thread; arguments as of `serve`."""
    import uvicorn

    from kiem.inference.server.app import Server
    from kiem.inference.server.completions import Limits
    from kiem.inference.server.connection import Connection
    from kiem.inference.server.metrics import Metrics
    from kiem.inference.server.worker import Worker

    writer = Writer(
        loaded.model,
        loaded.tokenizer,
        max_requests=options.max_requests,
        max_tokens=options.max_context,
    )
    limits = Limits(
        model=_model_name(options.model_path),
        sampling=sampling,
        max_new_tokens=options.max_new_tokens,
        stop=options.stop,
        max_context=options.max_context,
        max_sequences=options.max_requests + options.max_waiting,
    )
    metrics = Metrics(writer, limits.max_sequences)
    worker = Worker(writer, limits.max_sequences, metrics.watch)

    def end() -> None:
        server.should_exit = True

    app = Server(worker, limits, loaded.tokenizer, metrics).app(options.api_key, end)
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
