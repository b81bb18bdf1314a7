"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kiem.inference.engine import RequestOutput
from kiem.inference.server.access import with_access_control
from kiem.inference.server.completions import ServerSettings, parse_completion
from kiem.inference.server.errors import ApiError, server_failed, shown
from kiem.inference.server.response import CompletionResponse
from kiem.inference.server.worker import Job, Worker
from kiem.tokenizer.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_MOST_BODY_BYTES = 1 << 20
_ROUTES_HERE = (
    "There are POST /v1/completions, GET /v1/models, /health, /metrics and the page at /; "
    "a base model has no chats."
)
_PAGE = Path(__file__).parent / "page"


class Server:
    """The routes and what they need."""

    def __init__(self, worker: Worker, settings: ServerSettings, tokenizer: Tokenizer):
        self._worker = worker
        self._settings = settings
        self._tokenizer = tokenizer
        # For what may take seconds, and little of it at a time: a prompt of a megabyte takes a
        # second to encode, and 300 MB; the probabilities of a long prompt's tokens are a million
        # numbers to write.
        self._executor = ThreadPoolExecutor(2, "texts")

    def app(self, api_key: str | None, on_end: Callable[[], None]) -> ASGIApp:
        """Returns the application.

        Args:
            api_key: what every request must carry, or None.
            on_end: called when the engine's thread has ended.
        """

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self._worker.start(on_end)
            yield

        source = (_PAGE / "index.html").read_text("utf-8")
        template = jinja2.Environment(autoescape=True).from_string(source)
        model = {
            "id": self._settings.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "kiem",
            "max_model_len": self._settings.max_context,
        }
        always = {
            "/": HTMLResponse(template.render(settings=self._settings)),
            **{f"/{n}": FileResponse(_PAGE / n) for n in ("page.css", "page.js", "icon.svg")},
            "/v1/models": JSONResponse({"object": "list", "data": [model]}),
        }
        routes = [
            *(Route(path, response, methods=["GET"]) for path, response in always.items()),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        handlers: Mapping[Any, Callable[[Request, Any], Awaitable[Response]]] = {
            HTTPException: _error_response,
            ClientDisconnect: _no_response,
            Exception: _failure_response,
        }
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
        # It would redirect to the name under which a proxy asks.
        inner.router.redirect_slashes = False
        return with_access_control(inner, api_key, self._worker.metrics)

    async def health(self, _: Request) -> Response:
        """Whether the engine runs."""
        if self._worker.is_running:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, 503)

    async def metrics(self, _: Request) -> Response:
        """Figures for Prometheus."""
        text = generate_latest(self._worker.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Response:
        """Continues one or more prompts."""
        data = await _read_body(request)
        run = asyncio.get_running_loop().run_in_executor
        asked = await run(self._executor, parse_completion, data, self._settings, self._tokenizer)
        response = CompletionResponse(asked, self._settings.model, self._tokenizer)
        job = self._worker.submit(asked.requests)
        self._worker.metrics.prompt_tokens.inc(asked.num_prompt_tokens)
        if asked.body.stream:
            return _EventStream(job, response)
        outputs = await _collect(job, request)
        encoded = await run(self._executor, lambda: msgspec.json.encode(response.whole(outputs)))
        return Response(encoded, media_type="application/json")


class _EventStream(StreamingResponse):
    """A stream of server-sent events that closes its job however it ends."""

    def __init__(self, job: Job, response: CompletionResponse):
        # nginx would hold the parts back.
        headers = {"x-accel-buffering": "no"}
        super().__init__(_events(job, response), headers=headers, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator: a client may disconnect before that begins.
        with contextlib.closing(self._job):
            await super().__call__(scope, receive, send)


async def _events(job: Job, response: CompletionResponse) -> AsyncIterator[bytes]:
    """Yields the parts of a response as server-sent events."""
    try:
        async for part in response.stream(job.outputs()):
            yield _event(part)
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    except Exception:  # noqa: BLE001 - logged, and the client is told
        _LOG.exception("A stream has failed; the server continues.")
        yield _event(server_failed().body())


def _event(part: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(part) + b"\n\n"


async def _collect(job: Job, request: Request) -> list[tuple[int, RequestOutput]]:
    """Returns all that a job puts out, unless the client disconnects before."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.put(ClientDisconnect())

    watching = asyncio.ensure_future(watch())
    with contextlib.closing(job):
        try:
            return [event async for event in job.outputs()]
        finally:
            watching.cancel()


async def _read_body(request: Request) -> bytes:
    """Returns a request's body, if it is JSON and not too large.

    Pages of other sites can send JSON only after asking, which is never allowed (see access.py).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The content-type must be application/json.")
    body = bytearray()
    async for block in request.stream():
        body += block
        if len(body) > _MOST_BODY_BYTES:
            message = f"The body is larger than {_MOST_BODY_BYTES} bytes."
            raise ApiError(413, message, headers={"connection": "close"})
    return bytes(body)


async def _error_response(request: Request, error: HTTPException) -> Response:
    if not isinstance(error, ApiError):  # Starlette's own: an unknown path, or another method
        message = f"{request.method} {shown(request.url.path)}: {error.detail}. {_ROUTES_HERE}"
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response()


async def _failure_response(_: Request, __: Exception) -> Response:
    """Answers a request at which the server has failed; Starlette then lets it be logged."""
    return server_failed().response()


async def _no_response(_: Request, __: ClientDisconnect) -> Response:
    """Ends a request whose client has disconnected; only /metrics sees the status."""
    return Response(status_code=499)
