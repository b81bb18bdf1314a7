"""Tests of the numbers of processors and threads that a program takes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from kiem.core.processors import num_cores, num_processors

PREFERS_BF16 = """
import torch
from kiem.compute.speed import prefers_bf16
print(prefers_bf16(torch.device("cpu")))
"""
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")  # of version 1
# Says the threads of torch, and of OpenMP in the C++ kernels.
COUNT_THREADS = """
import ctypes, os
from rich.console import Console
from kiem.parallel.launch import use_processors
use_processors(Console(width=200))
import torch
print(torch.get_num_threads(), ctypes.CDLL(None).omp_get_max_threads(), flush=True)
os._exit(0)
"""


@pytest.fixture
def six_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))


@pytest.mark.usefixtures("six_processors")
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "900000 100000\n"}, 6),
        ({"cpu.max": ""}, 6),
        ({"pod/cpu.max": "200000 100000\n", "pod/program/cpu.max": "max 100000\n"}, 2),
        ({"pod/cpu.max": "400000 100000\n", "pod/program/cpu.max": "100000 50000\n"}, 2),
        ({"pod/other/cpu.max": "100000 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/outer/cpu.cfs_quota_us": "300000", "cpu/outer/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_the_quota_of_each_group_around_the_program_counts(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.write_text("7:memory:/pod\n4:cpu,cpuacct:/outer/inner\n1:name=systemd:/\n0::/pod/program\n")
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert num_processors(tmp_path / "cgroup", own) == expected


@pytest.mark.usefixtures("six_processors")
def test_processors_of_one_core_count_once(tmp_path: Path) -> None:
    assert num_cores(tmp_path) == min(6, num_processors()), "nothing is known of cores"
    for number in range(8):
        file = tmp_path / f"cpu{number}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{number % 4},{number % 4 + 4}\n")
    assert num_cores(tmp_path) == min(4, num_processors())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_processors() == num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture
def one_processor() -> Iterator[Path]:
    """A control group whose programs may use one processor."""
    group = CPU_GROUPS / f"kiem-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("needs control groups of version 1 that may be made")
    try:
        period = (group / "cpu.cfs_period_us").read_text()
        (group / "cpu.cfs_quota_us").write_text(period)
        yield group
    finally:
        with contextlib.suppress(FileNotFoundError):
            group.rmdir()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "count_threads.py"
    file.write_text(COUNT_THREADS)
    return file


def said(*command: str | Path, **variables: str) -> list[str]:
    """Returns the lines of a program where the user has set no number of threads but this."""
    kept = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    done = subprocess.run(
        command,
        env={**kept, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_threads_keep_to_a_quota(one_processor: Path, program: Path) -> None:
    enter = f"echo $$ > {one_processor}/tasks; "
    assert said("sh", "-c", f"{enter} exec {sys.executable} {program}") == ["1 1"]
    # A user's number is kept, also when it reaches the program through a launcher.
    launcher = f"{enter} TORCHELASTIC_RUN_ID=none {sys.executable} {program}; exit"
    assert said("sh", "-c", launcher, OMP_NUM_THREADS="2") == ["2 2"]


@pytest.mark.skipif(num_cores() == 1, reason="one thread, as a launcher sets, is right")
def test_a_launcher_does_not_choose_the_threads(program: Path) -> None:
    module = ("-m", "accelerate.commands.launch", "--num_processes", "1")
    assert said(sys.executable, *module, program) == [
        f"{num_cores()} threads, not the launcher's 1; OMP_NUM_THREADS changes that",
        f"{num_cores()} {num_cores()}",
    ]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_precision_follows_from_the_instructions(capability: str) -> None:
    is_capable = capability == "avx512" and "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    done = subprocess.run(
        [sys.executable, "-c", PREFERS_BF16],
        cwd=ROOT,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{is_capable}\n"
