"""Worker processes of this program: forks, which share the memory of the loaded tokenizers."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Sequence
from itertools import islice
from multiprocessing.connection import Connection, wait

from kiem.core.errors import UserError
from kiem.data.prepare.units import Job, Unit, UnitSummary, finish_unit
from kiem.tokenizer.encoding import Encoder, ended_from_outside

# Units with their summaries, in the order in which they are finished.
FinishedUnits = Generator[tuple[Unit, UnitSummary], None, None]
# What a worker sends.
Answer = tuple[Unit, UnitSummary] | UserError


def run_locally(job: Job, encoders: Sequence[Encoder | None]) -> FinishedUnits:
    """Finishes units in forked processes.

    There is one process per encoder; a single encoder is used in this process.
    """
    if len(encoders) == 1:
        for unit in job.units:
            yield unit, finish_unit(unit, job, encoders[0])
        return
    context = multiprocessing.get_context("fork")
    # By our end of their connections.
    workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    waiting = iter(job.units)
    num_left = len(job.units)
    try:
        for encoder in encoders:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, ours, job, encoder))
            process.start()
            theirs.close()
            workers[ours] = process
        while num_left:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                try:
                    answer = connection.recv()
                    for following in islice(waiting, 1):
                        connection.send(following)
                except (EOFError, OSError) as error:
                    workers[connection].join()
                    exit_code = workers[connection].exitcode
                    raise ended_from_outside(f"a worker process (exit code {exit_code})") from error
                if answer is not None:
                    num_left -= 1
                    yield result_of(answer)
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.terminate()
            worker.join()


def _work(connection: Connection, other_end: Connection, job: Job, encoder: Encoder | None) -> None:
    """Finishes the units that come through a connection; asks for the first one with None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # When the parent is killed, the last worker sees that its connection has ended; the others do
    # when those after them have ended, which hold the other end of their connections as well.
    other_end.close()
    answer = None
    while True:
        try:
            connection.send(answer)
            unit = connection.recv()
        except (EOFError, OSError):
            return
        answer = _finish(unit, job, encoder)


def _finish(unit: Unit, job: Job, encoder: Encoder | None) -> Answer:
    """Finishes a unit in a worker; returns a UserError that it raises."""
    try:
        return unit, finish_unit(unit, job, encoder)
    except UserError as error:
        return error


def result_of(answer: Answer) -> tuple[Unit, UnitSummary]:
    """Returns what a worker has sent; raises it if it is an error."""
    if isinstance(answer, UserError):
        raise answer
    return answer
