"""Metrics of the server for Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kiem.inference.engine import Engine, RequestOutput

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class ServerMetrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, engine: Engine, max_sequences: int):
        self.registry = own = CollectorRegistry()
        running = Gauge("kiem_sequences_running", "Sequences that have a slot", registry=own)
        running.set_function(lambda: engine.num_running)
        waiting = Gauge("kiem_sequences_waiting", "Sequences without a slot", registry=own)
        waiting.set_function(lambda: engine.num_waiting)
        Gauge("kiem_sequences_limit", "Most running and waiting", registry=own).set(max_sequences)
        counter = partial(Counter, registry=own)
        self.responses = counter("kiem_http_responses", "Responses", ("status",))
        self.prompt_tokens = counter("kiem_prompt_tokens", "Tokens of prompts")
        self._new_tokens = counter("kiem_new_tokens", "Tokens written")
        self._finished = counter("kiem_sequences_finished", "Sequences that ended", ("reason",))
        histogram = partial(Histogram, buckets=_SECONDS, registry=own)
        self.first_token_seconds = histogram(
            "kiem_first_token_seconds", "From a request to its first new token"
        )
        self.request_seconds = histogram(
            "kiem_request_seconds", "From a request to the end of its response"
        )

    def count(self, output: RequestOutput) -> None:
        """Counts an output of the engine."""
        self._new_tokens.inc(output.num_tokens)
        if output.finish_reason is not None:
            self._finished.labels(output.finish_reason).inc()
