"""The engine beside the event loop: requests in, outputs out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kiem.inference.engine import Engine, Request, RequestOutput
from kiem.inference.server.errors import ApiError, server_failed
from kiem.inference.server.metrics import ServerMetrics

_LOG = logging.getLogger(__name__)


class Job:
    """The sequences of one client's request."""

    def __init__(self, worker: Worker, num_sequences: int):
        self._worker = worker
        self._num_sequences = num_sequences
        self._started = time.perf_counter()
        self._events: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yields sequence and output as they come, until every sequence has ended.

        Raises:
            Exception: what was put instead of an output.
        """
        num_running = self._num_sequences
        has_token = False
        while num_running:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            output = event[1]
            if output.token is not None and not has_token:
                seconds = time.perf_counter() - self._started
                self._worker.metrics.first_token_seconds.observe(seconds)
                has_token = True
            num_running -= output.finish_reason is not None
            yield event

    def put(self, event: tuple[int, RequestOutput] | Exception) -> None:
        """Takes a sequence and its output, or why there will be no more."""
        self._events.put_nowait(event)

    def close(self) -> None:
        """Ends the job: cancels the sequences that have not ended."""
        self._worker.metrics.request_seconds.observe(time.perf_counter() - self._started)
        self._worker.cancel(self)


class Worker:
    """Runs the engine: its steps in a thread, all else on the event loop.

    Requests are added during a step, too, since that only appends to the engine's queue. They are
    cancelled between two steps.

    Args:
        engine: nothing else uses it.
        max_sequences: most sequences that run or wait.
    """

    def __init__(self, engine: Engine, max_sequences: int):
        self.metrics = ServerMetrics(engine, max_sequences)
        self._engine = engine
        self._max_sequences = max_sequences
        self._sequences: dict[int, tuple[Job, int]] = {}  # by the engine's number
        self._cancelled: list[int] = []
        self._has_work = asyncio.Event()
        # OpenMP counts threads for each thread that computes.
        self._executor = ThreadPoolExecutor(
            1, "engine", torch.set_num_threads, (torch.get_num_threads(),)
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return self._task is not None and not self._task.done()

    def start(self, on_end: Callable[[], None]) -> None:
        """Starts the work on this event loop; calls `on_end` when it ends for any reason."""

        def end(_: asyncio.Task[None]) -> None:
            for job in {job for job, _ in self._sequences.values()}:
                job.put(_stopping())
            on_end()

        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(end)

    def stop(self) -> None:
        """Waits for the current step, when the event loop has ended the work.

        Raises:
            Exception: the error that has ended the work before.
        """
        self._executor.shutdown()
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Hands requests to the engine.

        Raises:
            ApiError: there are too many sequences already, or the engine has stopped.
        """
        if not self.is_running:
            raise _stopping()
        if len(self._sequences) + len(requests) > self._max_sequences:
            message = "The server has as many requests as it takes; try again soon."
            raise ApiError(429, message, headers={"retry-after": "1"})
        job = Job(self, len(requests))
        for index, request in enumerate(requests):
            self._sequences[self._engine.add(request)] = job, index
        self._has_work.set()
        return job

    def cancel(self, job: Job) -> None:
        """Frees the slots of a job."""
        for number in [n for n, (other, _) in self._sequences.items() if other is job]:
            del self._sequences[number]
            self._cancelled.append(number)

    async def _run(self) -> None:
        """Works until the event loop ends, or the model itself fails."""
        loop = asyncio.get_running_loop()
        while True:
            while self._cancelled:
                self._engine.cancel(self._cancelled.pop())
            if self._sequences:
                for output in await loop.run_in_executor(self._executor, self._step):
                    self._deliver(output)
            else:
                self._has_work.clear()
                await self._has_work.wait()

    def _step(self) -> list[RequestOutput]:
        outputs = self._engine.step()
        for output in outputs:
            if output.error is not None:
                self._engine.check_model()  # raises if the model itself is the reason
                _LOG.error("A request has failed; the server continues.", exc_info=output.error)
        return outputs

    def _deliver(self, output: RequestOutput) -> None:
        self.metrics.count(output)
        if output.request_id not in self._sequences:  # cancelled during the step
            return
        job, index = self._sequences[output.request_id]
        if output.finish_reason is not None:
            del self._sequences[output.request_id]
        job.put((index, output) if output.error is None else server_failed())


def _stopping() -> ApiError:
    return ApiError(503, "The server is stopping.")
