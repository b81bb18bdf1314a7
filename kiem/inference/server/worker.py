"""The thread that owns the engine: it takes requests from the event loop and gives pieces back.

Everything but `_run` and what it calls runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue

from kiem.inference.engine import Request
from kiem.inference.streaming import Piece, Writer

_LOG = logging.getLogger(__name__)


class BusyError(Exception):
    """There are as many sequences as the server takes."""


class StoppedError(Exception):
    """The engine has stopped: the server is ending."""


class FailedError(Exception):
    """The request has ended at an error, which is in the log."""


class Job:
    """The sequences of one client's request."""

    def __init__(self, worker: Worker, num_sequences: int):
        self._worker = worker
        self._num_sequences = num_sequences
        self._events: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        self.open = set(range(num_sequences))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields sequence and piece as they come, until every sequence has ended.

        Raises:
            StoppedError: there will be no more.
            FailedError: a sequence cannot go on.
        """
        num_running = self._num_sequences  # some may have ended before anybody asks
        while num_running:
            event = await self._events.get()
            if event is None:
                raise StoppedError
            if (error := event[1].error) is not None:
                raise FailedError from error
            num_running -= event[1].finish_reason is not None
            yield event

    def put(self, event: tuple[int, Piece] | None) -> None:
        """Takes a piece of a sequence, or None when there will be no more."""
        if event is not None and event[1].finish_reason is not None:
            self.open.discard(event[0])
        self._events.put_nowait(event)

    def cancel(self) -> None:
        """Frees the slots of all sequences that have not ended."""
        if self.open:
            self._worker.cancel(self)
        self.open.clear()


class Worker:
    """Runs the engine in a thread of its own.

    Args:
        writer: the engine; only that thread uses it.
        most_open: most sequences that run or wait.
        watch: called on the event loop with every batch of pieces.
    """

    def __init__(self, writer: Writer, most_open: int, watch: Callable[[list[Piece]], None]):
        self._writer = writer
        self._most_open = most_open
        self._watch = watch
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._sequences: dict[int, tuple[Job, int]] = {}  # by the engine's number
        self._jobs: set[Job] = set()
        self._executor = ThreadPoolExecutor(1, "engine")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: Future[None] | None = None

    @property
    def num_open(self) -> int:
        """How many sequences run or wait."""
        return sum(len(job.open) for job in self._jobs)

    @property
    def is_running(self) -> bool:
        """Whether the thread is there to work."""
        return self._ended is not None and not self._ended.done()

    def start(self, on_end: Callable[[], None]) -> None:
        """Starts the thread; `on_end` is called on the event loop when it ends, however it does."""
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
            BaseException: what the thread stopped at by itself.
        """
        self._inbox.put(None)
        self._executor.shutdown()
        if self._ended is not None:
            self._ended.result()

    def submit(self, requests: Sequence[Request], stop: Sequence[str]) -> Job:
        """Hands requests to the engine.

        Args:
            requests: what to write.
            stop: texts that end a sequence.

        Raises:
            BusyError: they are too many beside those that are there.
            StoppedError: the engine has stopped.
        """
        if not self.is_running:
            raise StoppedError
        if self.num_open + len(requests) > self._most_open:
            raise BusyError
        job = Job(self, len(requests))
        self._jobs.add(job)

        def add() -> None:
            for index, request in enumerate(requests):
                try:
                    self._sequences[self._writer.add(request, stop)] = job, index
                except Exception as error:  # noqa: BLE001 - it is logged and told
                    self._log_failures([error])
                    failed = Piece(-1, "", None, None, [], "error", error=error)
                    self._call_on_loop(partial(self._deliver, [(job, index, failed)]))

        self._inbox.put(add)
        return job

    def cancel(self, job: Job) -> None:
        """Frees the slots of a job."""
        self._jobs.discard(job)

        def cancel() -> None:
            for number in [n for n, (other, _) in self._sequences.items() if other is job]:
                self._writer.cancel(number)
                del self._sequences[number]

        self._inbox.put(cancel)

    def _run(self) -> None:
        """Works until `stop`: the body of the thread."""
        while True:
            try:
                command = self._inbox.get(block=not self._writer.is_busy)
            except Empty:
                command = self._step
            if command is None:
                return
            command()

    def _step(self) -> None:
        pieces = self._writer.advance()
        self._log_failures([piece.error for piece in pieces if piece.error is not None])
        found = [(*self._sequences[piece.number], piece) for piece in pieces]
        for piece in pieces:
            if piece.finish_reason is not None:
                del self._sequences[piece.number]
        self._call_on_loop(partial(self._deliver, found))

    def _call_on_loop(self, call: Callable[[], None]) -> None:
        """Lets the event loop do something, unless it has ended: a second Ctrl-C waits for no step.

        Asking beforehand would not do, since it may end at any moment.
        """
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _log_failures(self, errors: list[Exception]) -> None:
        """Logs what requests have failed at; ends the thread if the model itself is the reason."""
        for error in errors:
            self._writer.check_model()
            _LOG.error("A request has failed; the server goes on.", exc_info=error)

    def _deliver(self, found: list[tuple[Job, int, Piece]]) -> None:
        for job, index, piece in found:
            job.put((index, piece))
            if not job.open:
                self._jobs.discard(job)
        self._watch([piece for _, _, piece in found])
