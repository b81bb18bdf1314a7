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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kiem.inference.server.answer import Answer
from kiem.inference.server.completions import Limits, Plan, plan, read_body
from kiem.inference.server.errors import ApiError, shown
from kiem.inference.server.guard import Guard
from kiem.inference.server.metrics import Metrics, Timer
from kiem.inference.server.worker import BusyError, FailedError, Job, StoppedError, Worker
from kiem.inference.streaming import Piece
from kiem.tokenizer.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_MOST_BODY_BYTES = 1 << 20
_BODY_SECONDS = 30
_MOST_THREADS = 2
_WHAT_THERE_IS = (
    "There are POST /v1/completions, GET /v1/models, /health, /metrics and the page at /."
)
_Result = TypeVar("_Result")
_PAGE_FILES = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


class Server:
    """What the routes need.

    Args:
        worker: the engine's thread.
        limits: what the server was started with.
        tokenizer: the model's.
        metrics: what is counted.
    """

    def __init__(self, worker: Worker, limits: Limits, tokenizer: Tokenizer, metrics: Metrics):
        self._worker = worker
        self._limits = limits
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._started = int(time.time())
        self._page = _render_page(limits)
        self._threads = asyncio.Semaphore(_MOST_THREADS)

    def app(self, api_key: str | None, on_end: Callable[[], None]) -> ASGIApp:
        """Returns the application.

        Args:
            api_key: what every request must carry, or None.
            on_end: called when the engine's thread has ended.
        """

        @contextlib.asynccontextmanager
        async def life(_: Starlette) -> AsyncIterator[None]:
            self._worker.start(on_end)
            yield

        routes = [
            Route("/", self.page),
            *(Route(f"/{name}", partial(_send_file, name=name)) for name in _PAGE_FILES),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
            ApiError: _send_error,
            HTTPException: _send_http_error,
            ClientDisconnect: _send_nothing,
            Exception: _send_defect,
        }
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=life)
        # It would lead to the name under which a proxy asks.
        inner.router.redirect_slashes = False
        known = {route.path for route in routes}
        return _Counted(Guard(inner, api_key), self._metrics, known)

    async def page(self, _: Request) -> Response:
        """The page to try the model."""
        return Response(self._page, media_type="text/html")

    async def health(self, _: Request) -> Response:
        """Whether the engine is there."""
        if self._worker.is_running:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, 503)

    async def metrics(self, _: Request) -> Response:
        """Figures for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        """The list of the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The one model by its name."""
        name = request.path_params["name"]
        if name != self._limits.model:
            message = f"The model {shown(name)} is not here; the only one is {self._limits.model}."
            raise ApiError(404, message, code="model_not_found")
        return JSONResponse(self._model())

    async def chat(self, _: Request) -> Response:
        """Says that there are no chats."""
        message = (
            f"{self._limits.model} is a base model: it continues texts and has no chats. "
            "Use /v1/completions with a prompt."
        )
        raise ApiError(404, message, param="model")

    async def completions(self, request: Request) -> Response:
        """Continues one or more prompts."""
        body = read_body(await _read(request))
        asked = await self._in_thread(partial(plan, body, self._limits, self._tokenizer))
        try:
            job = self._worker.submit(asked.requests, asked.stop)
        except BusyError:
            message = "The server has as many requests as it takes; try again soon."
            raise ApiError(429, message, headers={"retry-after": "1"}) from None
        except StoppedError:
            raise _stopped() from None
        timer = self._metrics.begin(asked.num_prompt_tokens)
        answer = Answer(asked, self._limits.model, self._tokenizer)
        if asked.stream:
            return _Stream(job, timer, _events(job, timer, answer))
        try:
            pieces = await _or_gone(request, _collect(job, timer, asked))
        finally:
            job.cancel()
            timer.end()
        data = await self._in_thread(lambda: msgspec.json.encode(answer.whole(pieces)))
        return Response(data, media_type="application/json")

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        """Does what may take seconds beside the event loop, and few of it at a time.

        A prompt of a megabyte takes one to encode, and 300 MB; the probabilities of a long one's
        tokens are a million numbers to write.
        """
        async with self._threads:
            return await anyio.to_thread.run_sync(work)

    def _model(self) -> dict[str, Any]:
        facts = {"object": "model", "created": self._started, "owned_by": "kiem"}
        return {"id": self._limits.model, **facts, "max_model_len": self._limits.max_context}


class _Stream(StreamingResponse):
    """A stream of events that frees its slots however it ends."""

    def __init__(self, job: Job, timer: Timer, events: AsyncIterator[bytes]):
        # nginx would hold the parts back.
        super().__init__(events, 200, {"x-accel-buffering": "no"}, "text/event-stream")
        self._job = job
        self._timer = timer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the generator: a client may be gone before that begins
            self._job.cancel()
            self._timer.end()


class _Counted:
    """Counts the answers of an application."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: set[str]):
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Not any path that somebody may think of: each would be a new series.
                route = scope["path"] if scope["path"] in self._routes else "other"
                self._metrics.respond(route, message["status"])
            await send(message)

        await self._app(scope, receive, count)


async def _events(job: Job, timer: Timer, answer: Answer) -> AsyncIterator[bytes]:
    """Yields the answer's parts as server-sent events."""
    try:
        for part in answer.opening():
            yield _event(part)
        async for index, piece in job.pieces():
            timer.see(piece)
            yield _event(answer.part(index, piece))
    except StoppedError:
        yield _event(_stopped().body())
        return
    except FailedError:
        yield _event(_failed().body())
        return
    except Exception:  # noqa: BLE001 - it is logged and told
        _LOG.exception("A stream has failed; the server goes on.")
        yield _event(_failed().body())
        return
    for part in answer.closing():
        yield _event(part)
    yield b"data: [DONE]\n\n"


def _event(part: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(part) + b"\n\n"


async def _collect(job: Job, timer: Timer, asked: Plan) -> list[list[Piece]]:
    """Returns the pieces of each sequence when all have ended."""
    pieces: list[list[Piece]] = [[] for _ in asked.requests]
    try:
        async for index, piece in job.pieces():
            timer.see(piece)
            pieces[index].append(piece)
    except StoppedError:
        raise _stopped() from None
    except FailedError:
        raise _failed() from None
    return pieces


async def _or_gone(request: Request, work: Awaitable[list[list[Piece]]]) -> list[list[Piece]]:
    """Waits for work, but not for longer than the client does."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _read(request: Request) -> bytes:
    """Returns a request's body, if it is JSON and not too large.

    Pages of other sites can send JSON only after asking, which is never allowed (see guard.py).
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


async def _send_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _send_http_error(request: Request, error: Exception) -> Response:
    """Answers what Starlette refuses: an unknown path, or another method."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {shown(request.url.path)}: {error.detail}."
    body = ApiError(error.status_code, f"{asked} {_WHAT_THERE_IS}").body()
    return JSONResponse(body, error.status_code, error.headers)


async def _send_defect(_: Request, __: Exception) -> Response:
    """Answers a request at which the server has failed; Starlette then lets it be logged."""
    return JSONResponse(_failed().body(), 500)


async def _send_nothing(_: Request, error: Exception) -> Response:
    """Ends what a client has left: nobody reads it but /metrics."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=499)


def _stopped() -> ApiError:
    return ApiError(503, "The server is stopping.")


def _failed() -> ApiError:
    return ApiError(500, "The server has failed at this request; its log says at what.")


async def _send_file(_: Request, name: str) -> Response:
    data = (resources.files(__package__) / "page" / name).read_bytes()
    return Response(data, media_type=_PAGE_FILES[name])


def _render_page(limits: Limits) -> str:
    """Returns the page with this server's model and values."""
    source = (resources.files(__package__) / "page" / "index.html").read_text("utf-8")
    return jinja2.Environment(autoescape=True).from_string(source).render(limits=limits)
