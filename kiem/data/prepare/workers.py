"""Runs the units of a plan in worker processes on this machine.

The workers are forked, so they share the loaded tokenizers' memory. Each asks for the next unit
when it is done with one; which worker takes which unit changes nothing in the result.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait

from kiem.core.errors import UserError
from kiem.data.prepare.unit_files import UnitSummary
from kiem.data.prepare.units import Unit, UnitJob, finish_unit
from kiem.tokenizer.encoding import Encoder
from kiem.tokenizer.reference import ended_from_outside

_PARENT_CHECK_SECONDS = 1.0


def run_units(
    units: Sequence[Unit], job: UnitJob, encoders: Sequence[Encoder]
) -> Generator[tuple[Unit, UnitSummary], None, None]:
    """Finishes units and yields each with its summary, in the order in which they get done.

    Args:
        units: what to do, best in the order of the plan.
        job: what is done with each.
        encoders: one for each worker process; a single one works in this process.

    Raises:
        UserError: what `finish_unit` raises, or a worker was killed. Finished units stay finished.
    """
    if len(encoders) == 1:
        for unit in units:
            yield unit, finish_unit(unit, job, encoders[0])
        return
    waiting = deque(units)
    workers = [_Worker(job, encoder) for encoder in encoders[: len(units)]]
    try:
        for worker in workers:
            worker.start(waiting.popleft())
        while busy := [worker for worker in workers if worker.unit is not None]:
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready:
                    unit, result = worker.result()
                    if waiting:
                        worker.start(waiting.popleft())
                    yield unit, result
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A forked process and the unit that it works on."""

    def __init__(self, job: UnitJob, encoder: Encoder):
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.unit: Unit | None = None
        self._process = context.Process(target=_work, args=(theirs, job, encoder))
        self._process.start()
        theirs.close()

    def start(self, unit: Unit) -> None:
        self.unit = unit
        with contextlib.suppress(OSError):  # it is dead, which `result` will report
            self.connection.send(unit)

    def result(self) -> tuple[Unit, UnitSummary]:
        unit, self.unit = self.unit, None
        assert unit is not None
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            worker = f"a worker process (exit code {self._process.exitcode})"
            raise ended_from_outside(worker) from error
        if isinstance(answer, UserError):
            raise answer
        return unit, answer

    def stop(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _work(connection: Connection, job: UnitJob, encoder: Encoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()
    # Not only until the end of the connection: later workers hold its other end as well, so it
    # stays open when the parent is killed.
    while True:
        while not connection.poll(_PARENT_CHECK_SECONDS):
            if os.getppid() != parent:
                return
        try:
            unit = connection.recv()
        except EOFError:
            return
        try:
            answer: UnitSummary | UserError = finish_unit(unit, job, encoder)
        except UserError as error:
            answer = error
        connection.send(answer)
