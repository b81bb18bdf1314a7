"""Runs the units of a plan on a Ray cluster.

The same units as on one machine become the same files. Every node must see the source and the
output folder under the same paths.
"""

from __future__ import annotations

import socket
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kiem.core.errors import ExitCode, UserError, not_installed
from kiem.core.files import write_bytes
from kiem.data.prepare.unit_files import UnitSummary
from kiem.data.prepare.units import Unit, UnitJob, finish_unit
from kiem.data.read.find_files import STANDARD_INPUT
from kiem.data.read.sources import Source
from kiem.tokenizer.encoding import Encoder, fast_path
from kiem.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, parse_tokenizer

_CONNECT_SECONDS = 10.0


def run_units_on_ray(
    units: Sequence[Unit],
    job: UnitJob,
    tokenizer: Tokenizer,
    encoder: str,
    num_proc: int | None,
    address: str | None,
) -> Generator[tuple[Unit, UnitSummary], None, None]:
    """Finishes units and yields each with its summary, in the order in which they get done.

    A worker that is killed is started again by Ray and makes its unit anew.

    Args:
        units: what to do.
        job: what is done with each.
        tokenizer: what every worker loads, from a copy beside the units.
        encoder: the `--encoder` option.
        num_proc: number of workers, each on one processor; by default one for each in the cluster.
        address: of a running cluster; by default one is started on this machine.

    Raises:
        UserError: Ray is not installed or not reachable, the text is this machine's standard input,
            or what `finish_unit` raises.
    """
    if STANDARD_INPUT in job.reading.source.names:
        raise UserError(
            "other machines cannot read this one's standard input",
            where="--source -",
            fix="Give a file on a disk that all of them share, or leave --executor ray out.",
            exit_code=ExitCode.BAD_OPTION,
        )
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise not_installed("ray", "--executor ray") from error
    settings: dict[str, Any] = {
        "address": address,
        "log_to_driver": False,
        "logging_level": "error",
    }
    if address is None:
        settings.update(address="local", num_cpus=num_proc, include_dashboard=False)
    try:
        if address is not None:
            _check_reachable(address)
        ray.init(**settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers ({str(error).splitlines()[0]})",
            where=f"--ray-address {address}",
            fix="Start one with `ray start --head`, or leave the option out to start a local one.",
            exit_code=ExitCode.NETWORK,
        ) from error
    try:
        num_workers = num_proc or int(ray.cluster_resources().get("CPU", 1))
        start = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=1)(_RayWorker).remote
        # A file, not an argument: a worker that is started again would not find that any more.
        write_bytes(job.folder / TOKENIZER_FILE, tokenizer.json_bytes)
        job = _everywhere(job)
        workers = [
            start(job, tokenizer.origin, encoder) for _ in range(min(num_workers, len(units)))
        ]
        pool: Any = ActorPool(workers)
        for unit, answer in pool.map_unordered(lambda w, unit: w.finish.remote(unit), units):
            if isinstance(answer, UserError):
                raise answer
            yield unit, answer
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises an OSError if nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


class _RayWorker:
    """What runs in each of Ray's worker processes: the loaded tokenizers."""

    def __init__(self, job: UnitJob, origin: str, encoder: str):
        self._job = job
        json_bytes = (job.folder / TOKENIZER_FILE).read_bytes()
        tokenizer = parse_tokenizer(json_bytes, origin)
        self._encoder = Encoder(tokenizer, fast_path(tokenizer, encoder))

    def finish(self, unit: Unit) -> tuple[Unit, UnitSummary | UserError]:
        """Finishes a unit; an error a person can mend is an answer, so Ray does not wrap it."""
        try:
            return unit, finish_unit(unit, self._job, self._encoder)
        except UserError as error:
            return unit, error


def _everywhere(job: UnitJob) -> UnitJob:
    """Returns the job with absolute paths: Ray's workers have other working folders."""

    def absolute(paths: list[Path]) -> list[Path]:
        return [path.absolute() for path in paths]

    source: Source = replace(job.reading.source, paths=absolute(job.reading.source.paths))
    return replace(job, folder=job.folder.absolute(), reading=replace(job.reading, source=source))
