"""Number of processors that a program may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def num_processors(cgroups: Path = _CGROUPS, own_cgroups: Path = _OWN_CGROUPS) -> int:
    """Returns how many processors the affinity and the quota of the container leave this program.

    Args:
        cgroups: where Linux shows its control groups, of version 1 or 2.
        own_cgroups: names those of this process, in the form of cgroups(7).
    """
    return min([len(_processors()), *map(math.ceil, _quotas(cgroups, own_cgroups))])


def num_cores(topology: Path = _TOPOLOGY) -> int:
    """Returns the same where processors that share a core count once.

    Two threads on one core compute matrix products no faster than one.

    Args:
        topology: a folder with a folder for each processor.
    """
    file = "topology/thread_siblings_list"
    cores = {_read(topology / f"cpu{number}" / file) or number for number in _processors()}
    return min(len(cores), num_processors())


def _processors() -> set[int]:
    """Returns the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return os.sched_getaffinity(0)
    return {*range(os.cpu_count() or 1)}


def _quotas(cgroups: Path, own_cgroups: Path) -> Iterator[float]:
    """Yields processors by the quota of each group around this process, if it has one.

    A container may see its own group as the root, under a path that is valid only outside.
    """
    for line in _read(own_cgroups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        group = Path(path.lstrip("/"))
        for folder in (root / group, *(root / parent for parent in group.parents)):
            text = _read(folder / "cpu.max")  # "max 100000" or "150000 100000" microseconds
            if controllers:
                text = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
            quota, _, period = text.partition(" ")
            if quota.isdigit() and period.isdigit():  # neither "max" nor -1
                yield int(quota) / int(period)


def _read(file: Path) -> str:
    """Returns what stands in a file of the system, "" if there is none."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
