"""Number of processors that a program may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def num_processors(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Returns how many processors the affinity and the quota of the container leave this program.

    Args:
        quota_file: of cgroup v2, in which a container finds its own limit: microseconds of
            processor time, or max, and the period in which they may be used.
    """
    number = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        number = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text(encoding="utf-8").split()
        return min(number, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # there is no such file, or it says max
        return number
