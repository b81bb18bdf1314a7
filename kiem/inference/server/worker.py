"""The thread that owns the engine: it takes requests from the event loop and returns outputs.

All but `_run` and what it calls runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue

from kiem.inference.engine import Engine, Request, RequestOutput
from kiem.inference.server.errors import ApiError, server_failed
from kiem.inference.server.metrics import ServerMetrics

_LOG = logging.getLogger(__name__)


class Job:
    """The sequences of one client's request."""

    def __init__(self, worker: Worker, metrics: ServerMetrics, num_sequences: int):
        self._worker = worker
        self._metrics = metrics
        self._num_sequences = num_sequences
        self._started = time.perf_counter()
        self._events: asyncio.Queue[tuple[int, RequestOutput] | None] = asyncio.Queue()
        self.open = set(range(num_sequences))

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yields sequence and output as they come, until every sequence has ended.

        Raises:
            ApiError: a sequence has failed, or the engine has stopped.
        """
        num_running = self._num_sequences  # some may have ended already
        has_token = False
        while num_running:
            event = await self._events.get()
            if event is None:
                raise _stopping()
            output = event[1]
            if output.error is not None:
                raise server_failed() from output.error
            if output.token is not None and not has_token:
                self._metrics.first_token_seconds.observe(time.perf_counter() - self._started)
                has_token = True
            num_running -= output.finish_reason is not None
            yield event

    def put(self, event: tuple[int, RequestOutput] | None) -> None:
        """Takes an output of a sequence, or None when there will be no more."""
        if event is not None and event[1].finish_reason is not None:
            self.open.discard(event[0])
        self._events.put_nowait(event)

    def close(self) -> None:
        """Ends the job once and for all: cancels the sequences that have not ended."""
        self._metrics.request_seconds.observe(time.perf_counter() - self._started)
        if self.open:
            self._worker.cancel(self)
        self.open.clear()


class Worker:
    """Runs the engine in a thread of its own.

    Args:
        engine: only that thread uses it.
        max_sequences: most sequences that run or wait.
        metrics: counts the outputs.
    """

    def __init__(self, engine: Engine, max_sequences: int, metrics: ServerMetrics):
        self._engine = engine
        self._max_sequences = max_sequences
        self._metrics = metrics
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._sequences: dict[int, tuple[Job, int]] = {}  # by the engine's number
        self._jobs: set[Job] = set()
        self._executor = ThreadPoolExecutor(1, "engine")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: Future[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether the thread runs."""
        return self._ended is not None and not self._ended.done()

    def start(self, on_end: Callable[[], None]) -> None:
        """Starts the thread; `on_end` is called on the event loop when it ends for any reason."""
        self._loop = asyncio.get_running_loop()

        def end() -> None:
            for job in self._jobs:
                job.put(None)
            on_end()

        self._ended = self._executor.submit(self._run)
        self._ended.add_done_callback(lambda _: self._call_on_loop(end))

    def stop(self) -> None:
        """Ends the thread after its current step, and waits for that.

        Raises:
            BaseException: the error that has ended the thread before.
        """
        self._inbox.put(None)
        self._executor.shutdown()
        if self._ended is not None:
            self._ended.result()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Hands requests to the engine.

        Raises:
            ApiError: there are too many sequences already, or the engine has stopped.
        """
        if not self.is_running:
            raise _stopping()
        if sum(len(job.open) for job in self._jobs) + len(requests) > self._max_sequences:
            message = "The server has as many requests as it takes; try again soon."
            raise ApiError(429, message, headers={"retry-after": "1"})
        job = Job(self, self._metrics, len(requests))
        self._jobs.add(job)

        def add() -> None:
            for index, request in enumerate(requests):
                try:
                    self._sequences[self._engine.add(request)] = job, index
                except Exception as error:  # noqa: BLE001 - logged, and the client gets a 500
                    self._log_errors([error])
                    failed = RequestOutput(-1, finish_reason="error", error=error)
                    self._call_on_loop(partial(self._deliver, [(job, index, failed)]))

        self._inbox.put(add)
        return job

    def cancel(self, job: Job) -> None:
        """Frees the slots of a job."""
        self._jobs.discard(job)

        def cancel() -> None:
            for number in [n for n, (other, _) in self._sequences.items() if other is job]:
                self._engine.cancel(number)
                del self._sequences[number]

        self._inbox.put(cancel)

    def _run(self) -> None:
        """Works until `stop`: the body of the thread."""
        while True:
            try:
                command = self._inbox.get(block=not self._sequences)
            except Empty:
                command = self._step
            if command is None:
                return
            command()

    def _step(self) -> None:
        outputs = self._engine.step()
        self._log_errors([output.error for output in outputs if output.error is not None])
        found = [(*self._sequences[output.request_id], output) for output in outputs]
        for output in outputs:
            if output.finish_reason is not None:
                del self._sequences[output.request_id]
        self._call_on_loop(partial(self._deliver, found))

    def _call_on_loop(self, call: Callable[[], None]) -> None:
        """Calls on the event loop, unless that has ended: a second Ctrl-C waits for no step.

        Asking beforehand would not do, since it may end at any moment.
        """
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _log_errors(self, errors: Sequence[Exception]) -> None:
        """Logs the errors of requests; ends the thread if the model itself is the reason."""
        for error in errors:
            self._engine.check_model()
            _LOG.error("A request has failed; the server continues.", exc_info=error)

    def _deliver(self, found: Sequence[tuple[Job, int, RequestOutput]]) -> None:
        for job, index, output in found:
            job.put((index, output))
            if not job.open:
                self._jobs.discard(job)
        self._metrics.count_outputs([output for _, _, output in found])


def _stopping() -> ApiError:
    return ApiError(503, "The server is stopping.")
