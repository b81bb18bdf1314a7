"""Worker processes that finish the units of a plan, on this machine or on a Ray cluster.

A worker takes the next unit when it has finished one. The result does not depend on which worker
takes which unit.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.console import Console

from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError, not_installed
from kiem.core.files import write_bytes
from kiem.core.processors import num_processors
from kiem.data.prepare.units import Job, Unit, UnitSummary, finish_unit
from kiem.tokenizer.encoding import Encoder, ended_from_outside, fast_path, load_encoders
from kiem.tokenizer.tokenizer import TOKENIZER_FILE, parse_tokenizer

_CONNECT_SECONDS = 10.0

# Units with their summaries, in the order in which they are finished.
FinishedUnits = Generator[tuple[Unit, UnitSummary], None, None]


def run_units(job: Job, console: Console) -> FinishedUnits:
    """Finishes units in the workers that the options ask for.

    Raises a UserError as `finish_unit` does, or if a worker is killed. Finished units are kept. The
    console shows why encoding is slow, if it is.
    """
    options, tokenizer = job.options, job.tokenizer
    fast = fast_path(tokenizer, options.encoder) if tokenizer else ""
    if tokenizer and isinstance(fast, str) and options.encoder == "auto":
        warn(console, f"encoding slowly with the tokenizers library: {fast}")
    if options.executor == "ray":
        yield from _run_on_ray(job)
        return
    num_workers = min(options.num_proc or num_processors(), len(job.units))
    if tokenizer is None:
        yield from _run_locally(job, [None] * num_workers)
        return
    with load_encoders(tokenizer, fast, num_workers) as encoders:
        yield from _run_locally(job, encoders)


def _run_locally(job: Job, encoders: Sequence[Encoder | None]) -> FinishedUnits:
    """Finishes units in forked processes, which share the memory of the loaded tokenizers.

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
                    yield _result(answer)
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


def _finish(unit: Unit, job: Job, encoder: Encoder | None) -> tuple[Unit, UnitSummary] | UserError:
    """Finishes a unit in a worker; returns a UserError, which Ray would wrap if it was raised."""
    try:
        return unit, finish_unit(unit, job, encoder)
    except UserError as error:
        return error


def _result(answer: tuple[Unit, UnitSummary] | UserError) -> tuple[Unit, UnitSummary]:
    if isinstance(answer, UserError):
        raise answer
    return answer


def _run_on_ray(job: Job) -> FinishedUnits:
    """Finishes units on a Ray cluster; every node must see the same files under the same paths.

    Ray restarts a killed worker, which makes its unit again.
    """
    ray = _start_ray(job.options.num_proc, job.options.ray_address)
    from ray.util import ActorPool

    try:
        # Ray's workers have other working folders.
        files = [file._replace(path=file.path.absolute()) for file in job.source.files]
        source, folder = replace(job.source, files=files), job.folder.absolute()
        given = replace(job, source=source, folder=folder, units=(), tokenizer=None)
        origin = None
        if job.tokenizer is not None:
            # A file, not an argument, which a restarted worker would not find.
            write_bytes(folder / TOKENIZER_FILE, job.tokenizer.json_bytes)
            origin = job.tokenizer.origin
        num_workers = job.options.num_proc or int(ray.cluster_resources().get("CPU", 1))
        start = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=1)(_RayWorker).remote
        workers = [start(given, origin) for _ in range(min(num_workers, len(job.units)))]
        finish: Any = ActorPool(workers).map_unordered
        yield from map(_result, finish(lambda worker, unit: worker.finish.remote(unit), job.units))
    finally:
        ray.shutdown()


class _RayWorker:
    """One of Ray's worker processes, with the loaded tokenizer."""

    def __init__(self, job: Job, origin: str | None):
        self._job = job
        self._encoder: Encoder | None = None
        if origin is not None:
            tokenizer = parse_tokenizer((job.folder / TOKENIZER_FILE).read_bytes(), origin)
            self._job = replace(job, tokenizer=tokenizer)
            self._encoder = Encoder(tokenizer, fast_path(tokenizer, job.options.encoder))

    def finish(self, unit: Unit) -> tuple[Unit, UnitSummary] | UserError:
        return _finish(unit, self._job, self._encoder)


def _start_ray(num_proc: int | None, address: str | None) -> Any:
    """Connects to a Ray cluster, or starts one of `num_proc` workers; returns the module."""
    try:
        import ray
    except ImportError as error:
        raise not_installed("ray", "--executor ray") from error
    try:
        # Ray itself tries for minutes to reach an address where nothing listens.
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        own: dict[str, Any] = {"num_cpus": num_proc, "include_dashboard": False}
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        ray.init(address or "local", **quiet, **({} if address else own))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers ({str(error).splitlines()[0]})",
            where=f"--ray-address {address}",
            fix="Start one with `ray start --head`, or leave the option out to start a local one.",
            exit_code=ExitCode.NETWORK,
        ) from error
    return ray
