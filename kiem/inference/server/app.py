"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from importlib import resources
from typing import Any, TypeVar

import anyio
import jinja2
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kiem.inference.engine import RequestOutput
from kiem.inference.server.access import AccessControl
from kiem.inference.server.completions import ServerSettings, model_not_found, parse_completion
from kiem.inference.server.errors import ApiError, server_failed, shown
from kiem.inference.server.response import CompletionResponse
from kiem.inference.server.worker import Job, Worker
from kiem.tokenizer.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_MOST_BODY_BYTES = 1 << 20
_BODY_SECONDS = 30
_MOST_THREADS = 2
_ROUTES_HERE = (
    "There are POST /v1/completions, GET /v1/models, /health, /metrics and the page at /."
)
_PAGE_FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_Result = TypeVar("_Result")


class Server:
    """The routes and what they need."""

    def __init__(self, worker: Worker, settings: ServerSettings, tokenizer: Tokenizer):
        self._worker = worker
        self._settings = settings
        self._tokenizer = tokenizer
        self._metrics = worker.metrics
        source = (resources.files(__package__) / "page" / "index.html").read_text("utf-8")
        template = jinja2.Environment(autoescape=True).from_string(source)
        self._page = template.render(settings=settings)
        self._model = {
            "id": settings.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "kiem",
            "max_model_len": settings.max_context,
        }
        self._threads = asyncio.Semaphore(_MOST_THREADS)

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

        routes = [
            Route("/", self.page),
            *(Route(f"/{name}", partial(_page_file, name=name)) for name in _PAGE_FILES),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers: Mapping[Any, Callable[[Request, Any], Awaitable[Response]]] = {
            HTTPException: _error_response,
            ClientDisconnect: _no_response,
            Exception: _failure_response,
        }
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
        # It would redirect to the name under which a proxy asks.
        inner.router.redirect_slashes = False
        known = {route.path for route in routes}

        def count(path: str, status: int) -> None:
            # Not any path that somebody may think of: each would be a new series.
            self._metrics.count_response(path if path in known else "other", status)

        return AccessControl(inner, api_key, count)

    async def page(self, _: Request) -> Response:
        """The page to try the model."""
        return Response(self._page, media_type="text/html")

    async def health(self, _: Request) -> Response:
        """Whether the engine runs."""
        is_running = self._worker.is_running
        return JSONResponse(
            {"status": "ok" if is_running else "stopped"}, 200 if is_running else 503
        )

    async def metrics(self, _: Request) -> Response:
        """Figures for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        """The list of the one model."""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """The one model by its name."""
        name = request.path_params["name"]
        if name != self._settings.model:
            raise model_not_found(name, self._settings)
        return JSONResponse(self._model)

    async def chat(self, _: Request) -> Response:
        """Refuses chats."""
        message = (
            f"{self._settings.model} is a base model: it continues texts and has no chats. "
            "Use /v1/completions with a prompt."
        )
        raise ApiError(404, message, param="model")

    async def completions(self, request: Request) -> Response:
        """Continues one or more prompts."""
        data = await _read_body(request)
        asked = await self._in_thread(
            lambda: parse_completion(data, self._settings, self._tokenizer)
        )
        job = self._worker.submit(asked.requests)
        self._metrics.prompt_tokens.inc(asked.num_prompt_tokens)
        response = CompletionResponse(asked, self._settings.model, self._tokenizer)
        if asked.body.stream:
            return _EventStream(job, _events(job, response))
        outputs: list[list[RequestOutput]] = [[] for _ in asked.requests]

        async def collect() -> None:
            async for index, output in job.outputs():
                outputs[index].append(output)

        try:
            await _while_connected(request, collect())
        finally:
            job.close()
        encoded = await self._in_thread(lambda: msgspec.json.encode(response.whole(outputs)))
        return Response(encoded, media_type="application/json")

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        """Runs what may take seconds beside the event loop, and little of it at a time.

        A prompt of a megabyte takes a second to encode, and 300 MB; the probabilities of a long
        prompt's tokens are a million numbers to write.
        """
        async with self._threads:
            return await anyio.to_thread.run_sync(work)


class _EventStream(StreamingResponse):
    """A stream of server-sent events that closes its job however it ends."""

    def __init__(self, job: Job, events: AsyncIterator[bytes]):
        # nginx would hold the parts back.
        super().__init__(events, 200, {"x-accel-buffering": "no"}, "text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the generator: a client may disconnect before that begins
            self._job.close()


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


async def _while_connected(request: Request, work: Awaitable[None]) -> None:
    """Waits for work, but not after the client has disconnected."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _read_body(request: Request) -> bytes:
    """Returns a request's body, if it is JSON and not too large.

    Pages of other sites can send JSON only after asking, which is never allowed (see access.py).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The content-type must be application/json.")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        message = f"The content-encoding is {shown(encoding)}; send the body uncompressed."
        raise ApiError(415, message)
    body = bytearray()
    try:
        with anyio.fail_after(_BODY_SECONDS):
            async for block in request.stream():
                body += block
                if len(body) > _MOST_BODY_BYTES:
                    message = f"The body is larger than {_MOST_BODY_BYTES} bytes."
                    raise ApiError(413, message, headers={"connection": "close"})
    except TimeoutError:
        message = f"The body did not come within {_BODY_SECONDS} seconds."
        raise ApiError(408, message, headers={"connection": "close"}) from None
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


async def _page_file(_: Request, name: str) -> Response:
    data = (resources.files(__package__) / "page" / name).read_bytes()
    return Response(data, media_type=_PAGE_FILES[name])
