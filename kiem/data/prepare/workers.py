"""Worker processes that finish the units of a plan, on this machine or on a Ray cluster.

A worker takes the next unit when it has finished one. The result does not depend on which worker
takes which unit.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from kiem.core.errors import ExitCode, UserError, bad_option, not_installed
from kiem.core.files import write_bytes
from kiem.data.prepare.units import Unit, UnitJob, UnitSummary, finish_unit
from kiem.data.read.source_file import STANDARD_INPUT
from kiem.tokenizer.encoding import Encoder, ended_from_outside, fast_path
from kiem.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, parse_tokenizer

_PARENT_CHECK_SECONDS = 1.0
_CONNECT_SECONDS = 10.0

# Units with their summaries, in the order in which they are finished.
FinishedUnits = Generator[tuple[Unit, UnitSummary], None, None]


def run_units(
    units: Sequence[Unit], job: UnitJob, encoders: Sequence[Encoder | None]
) -> FinishedUnits:
    """Finishes units in forked processes, which share the memory of the loaded tokenizers.

    There is one process per encoder; a single encoder is used in this process. Raises a UserError
    as `finish_unit` does, or if a worker is killed. Finished units are kept.
    """
    if len(encoders) == 1:
        for unit in units:
            yield unit, finish_unit(unit, job, encoders[0])
        return
    waiting = deque(units)
    workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    busy: dict[Connection, Unit] = {}

    def start_next(connection: Connection) -> None:
        if waiting:
            busy[connection] = waiting.popleft()
            with contextlib.suppress(OSError):  # a dead worker: recv() reports it
                connection.send(busy[connection])

    try:
        context = multiprocessing.get_context("fork")
        for encoder in encoders[: len(units)]:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, job, encoder))
            process.start()
            theirs.close()
            workers[ours] = process
            start_next(ours)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                unit = busy.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, OSError) as error:
                    workers[connection].join()
                    exit_code = workers[connection].exitcode
                    raise ended_from_outside(f"a worker process (exit code {exit_code})") from error
                start_next(connection)
                yield unit, _raise_error(answer)
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.terminate()
            worker.join()


def _work(connection: Connection, job: UnitJob, encoder: Encoder | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()
    # The end of the connection is not enough: later workers hold its other end as well, so it stays
    # open when the parent is killed.
    while True:
        while not connection.poll(_PARENT_CHECK_SECONDS):
            if os.getppid() != parent:
                return
        try:
            unit = connection.recv()
        except EOFError:
            return
        connection.send(_finish(unit, job, encoder))


def _finish(unit: Unit, job: UnitJob, encoder: Encoder | None) -> UnitSummary | UserError:
    """Finishes a unit in a worker; returns a UserError, which Ray would wrap if it was raised."""
    try:
        return finish_unit(unit, job, encoder)
    except UserError as error:
        return error


def _raise_error(answer: UnitSummary | UserError) -> UnitSummary:
    if isinstance(answer, UserError):
        raise answer
    return answer


def run_units_on_ray(
    units: Sequence[Unit],
    job: UnitJob,
    tokenizer: Tokenizer | None,
    encoder: str,
    num_proc: int | None,
    address: str | None,
) -> FinishedUnits:
    """Finishes units on a Ray cluster; every node must see the same files under the same paths.

    Ray restarts a killed worker, which makes its unit again.

    Args:
        units: what to do.
        job: how each is processed.
        tokenizer: loaded by every worker, from a copy beside the units; None: no ids are made.
        encoder: the `--encoder` option.
        num_proc: number of workers; by default one for each processor of the cluster.
        address: of a running cluster; by default one is started on this machine.
    """
    if any(file.name == STANDARD_INPUT for file in job.source.files):
        what = "other machines cannot read this one's standard input"
        fix = "Give a file on a disk that all of them share, or leave --executor ray out."
        raise bad_option("--source -", what, fix)
    ray = _start_ray(num_proc, address)
    from ray.util import ActorPool

    try:
        origin = None
        if tokenizer is not None:
            # A file, not an argument, which a restarted worker would not find.
            write_bytes(job.folder / TOKENIZER_FILE, tokenizer.json_bytes)
            origin = tokenizer.origin
        # Ray's workers have other working folders.
        files = [file._replace(path=file.path.absolute()) for file in job.source.files]
        source = replace(job.source, files=files)
        job = replace(job, folder=job.folder.absolute(), source=source)
        num_workers = min(num_proc or int(ray.cluster_resources().get("CPU", 1)), len(units))
        start = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=1)(_RayWorker).remote
        pool: Any = ActorPool([start(job, origin, encoder) for _ in range(num_workers)])
        for unit, answer in pool.map_unordered(lambda w, unit: w.finish.remote(unit), units):
            yield unit, _raise_error(answer)
    finally:
        ray.shutdown()


class _RayWorker:
    """One of Ray's worker processes, with the loaded tokenizer."""

    def __init__(self, job: UnitJob, origin: str | None, encoder: str):
        self._job = job
        self._encoder: Encoder | None = None
        if origin is not None:
            tokenizer = parse_tokenizer((job.folder / TOKENIZER_FILE).read_bytes(), origin)
            self._encoder = Encoder(tokenizer, fast_path(tokenizer, encoder))

    def finish(self, unit: Unit) -> tuple[Unit, UnitSummary | UserError]:
        return unit, _finish(unit, self._job, self._encoder)


def _start_ray(num_proc: int | None, address: str | None) -> Any:
    """Connects to a Ray cluster, or starts one of `num_proc` workers; returns the module."""
    try:
        import ray
    except ImportError as error:
        raise not_installed("ray", "--executor ray") from error
    try:
        if address is None:
            cluster: dict[str, Any] = {"num_cpus": num_proc, "include_dashboard": False}
        else:
            cluster = {}
            # Ray itself tries for minutes to reach an address where nothing listens.
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if host and port.isdecimal():
                socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        ray.init(address=address or "local", **quiet, **cluster)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers ({str(error).splitlines()[0]})",
            where=f"--ray-address {address}",
            fix="Start one with `ray start --head`, or leave the option out to start a local one.",
            exit_code=ExitCode.NETWORK,
        ) from error
    return ray
