"""Metrics of the server for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kiem.inference.engine import Engine, RequestOutput

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class ServerMetrics:
    """The figures of one server, in a registry of its own.

    Args:
        engine: the engine that runs the sequences.
        max_sequences: most sequences that can run or wait.
    """

    def __init__(self, engine: Engine, max_sequences: int):
        self._registry = own = CollectorRegistry()
        running = Gauge("kiem_sequences_running", "Sequences that have a slot", registry=own)
        running.set_function(lambda: engine.num_running)
        waiting = Gauge("kiem_sequences_waiting", "Sequences without a slot", registry=own)
        waiting.set_function(lambda: engine.num_waiting)
        Gauge("kiem_sequences_limit", "Most running and waiting", registry=own).set(max_sequences)
        self._responses = Counter(
            "kiem_http_responses", "Responses", ("route", "status"), registry=own
        )
        self.prompt_tokens = Counter("kiem_prompt_tokens", "Tokens of prompts", registry=own)
        self._new_tokens = Counter("kiem_new_tokens", "Tokens written", registry=own)
        self._finished = Counter(
            "kiem_sequences_finished", "Sequences that ended", ("reason",), registry=own
        )
        self.first_token_seconds = Histogram(
            "kiem_first_token_seconds",
            "From a request to its first new token",
            buckets=_SECONDS,
            registry=own,
        )
        self.request_seconds = Histogram(
            "kiem_request_seconds",
            "From a request to the end of its response",
            buckets=_SECONDS,
            registry=own,
        )

    def count_response(self, route: str, status: int) -> None:
        """Counts a response."""
        self._responses.labels(route, str(status)).inc()

    def count(self, output: RequestOutput) -> None:
        """Counts an output of the engine."""
        self._new_tokens.inc(output.num_tokens)
        if output.finish_reason is not None:
            self._finished.labels(output.finish_reason).inc()

    def text(self) -> bytes:
        """Returns all figures in Prometheus's text format."""
        return generate_latest(self._registry)
