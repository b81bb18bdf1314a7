"""What counts as memory of the program, and what it gives back."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script

from kiem.data.chunks import Chunks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is resident")
NUM_BYTES = 64_000_000
# Frees every other one of many tensors, so that nothing at the end of the memory is free.
GIVE_BACK = """
import re
import torch
from kiem.compute.memory import give_back_free_memory, keep_freed_memory

def resident_bytes():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])

keep_freed_memory()
tensors = [torch.ones(1_000_000) for _ in range(100)]
before = resident_bytes()
del tensors[::2]
kept = resident_bytes()
give_back_free_memory()
print(before - kept, before - resident_bytes())
"""


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[mmap.mmap]:
    path = tmp_path / "shard"
    path.write_bytes(bytes(NUM_BYTES))
    with path.open("rb") as file:
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def mapped_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssFile:\s+(\d+)", status)
    assert found
    return 1024 * int(found[1])


def test_chunks_that_were_read_do_not_count_as_memory(shard: mmap.mmap) -> None:
    rows = np.frombuffer(shard, np.int32).reshape(-1, 500)
    chunks = Chunks([rows], np.array([0]), len(rows), 500, [shard])
    before = mapped_bytes()
    total = 0
    for start in range(0, len(rows), 1000):
        total += int(chunks.read(np.arange(start, start + 1000)).sum())
    assert total == 0
    assert mapped_bytes() - before < NUM_BYTES / 8
    assert rows.sum() == 0  # still there, and now it counts
    assert mapped_bytes() - before > NUM_BYTES / 2


def test_free_memory_is_kept_and_given_back(tmp_path: Path) -> None:
    """200 of 400 MB, in pieces between others."""
    program = tmp_path / "give_back.py"
    program.write_text(GIVE_BACK)
    done = run_script(program, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    kept, given_back = map(int, done.stdout.split())
    assert kept < 20e6
    assert given_back > 150e6
