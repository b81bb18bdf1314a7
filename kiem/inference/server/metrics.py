"""What /metrics tells Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kiem.inference.streaming import Piece, Writer

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Counters of a server's life, in a registry of its own.

    Args:
        writer: whose sequences are counted.
        max_sequences: most of them that can be there, running or waiting.
    """

    def __init__(self, writer: Writer, max_sequences: int):
        self._registry = registry = CollectorRegistry()
        running = Gauge("kiem_sequences_running", "Sequences that have a slot", registry=registry)
        running.set_function(lambda: writer.num_running)
        waiting = Gauge("kiem_sequences_waiting", "Sequences without a slot", registry=registry)
        waiting.set_function(lambda: writer.num_waiting)
        most = Gauge("kiem_sequences_limit", "Most running and waiting", registry=registry)
        most.set(max_sequences)
        self._responses = Counter(
            "kiem_http_responses",
            "Answers by route and status",
            ("route", "status"),
            registry=registry,
        )
        self._prompt_tokens = Counter("kiem_prompt_tokens", "Tokens of prompts", registry=registry)
        self._new_tokens = Counter("kiem_new_tokens", "Tokens written", registry=registry)
        self._finished = Counter(
            "kiem_sequences_finished",
            "Sequences by the reason of their end",
            ("reason",),
            registry=registry,
        )
        self._first_token = Histogram(
            "kiem_first_token_seconds",
            "From a request to its first new token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._request = Histogram(
            "kiem_request_seconds",
            "From a request to the end of its answer",
            buckets=_SECONDS,
            registry=registry,
        )

    def respond(self, route: str, status: int) -> None:
        """Counts an answer."""
        self._responses.labels(route, str(status)).inc()

    def begin(self, num_prompt_tokens: int) -> Timer:
        """Counts a request that goes to the engine, and returns its clock."""
        self._prompt_tokens.inc(num_prompt_tokens)
        return Timer(self._first_token, self._request)

    def watch(self, pieces: list[Piece]) -> None:
        """Counts what the engine has written."""
        self._new_tokens.inc(sum(piece.token is not None for piece in pieces))
        for piece in pieces:
            if piece.finish_reason is not None:
                self._finished.labels(piece.finish_reason).inc()

    def text(self) -> bytes:
        """Returns everything in Prometheus's text format."""
        return generate_latest(self._registry)


class Timer:
    """The clock of one request."""

    def __init__(self, first_token: Histogram, request: Histogram):
        self._started = time.perf_counter()
        self._first_token: Histogram | None = first_token
        self._request = request

    def see(self, piece: Piece) -> None:
        """Tells of a piece; only the first new token counts."""
        is_token = piece.token is not None or piece.finish_reason == "eos"
        if is_token and self._first_token is not None:
            self._first_token.observe(time.perf_counter() - self._started)
            self._first_token = None

    def end(self) -> None:
        """Tells of the answer's end."""
        self._request.observe(time.perf_counter() - self._started)
