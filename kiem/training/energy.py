"""How much energy the hardware takes, where it counts that itself.

Processors count in Linux's powercap files (RAPL), GPUs through NVML. Both count for everybody who
uses them, and this process sees those of its own machine only. NVML is untried, for want of a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
# A processor counts up to a number and begins again; this one could not do so twice in that time.
_MOST_WATTS = 500


@dataclass
class _Counter:
    """A counter that begins again at `turn`, if it does; each count is so many microjoules."""

    read: Callable[[], int]
    turn: int | None
    last: int
    microjoules: int = 1


class EnergyMeter:
    """Adds up what the processors, and the GPUs if training uses them, have taken.

    Args:
        device: where training computes.
        powercap: the folder of Linux's counters.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP):
        self._counters = _processor_counters(powercap)
        if device.type == "cuda":
            gpus = _gpu_counters()
            # Processors alone would be a small part of the truth.
            self._counters = self._counters + gpus if gpus else []
        self._last_read = time.monotonic()

    def read_joules(self) -> float | None:
        """Returns the energy since the last call, or None when it cannot be known."""
        now = time.monotonic()
        most_microjoules = (now - self._last_read) * _MOST_WATTS * 1e6
        self._last_read = now
        joules = 0.0
        for counter in self._counters:
            value = counter.read()
            if counter.turn is not None and most_microjoules > counter.turn:
                self._counters = []
                break
            used = value - counter.last
            if counter.turn is not None:
                used %= counter.turn
            joules += used * counter.microjoules / 1e6
            counter.last = value
        return joules if self._counters else None


def _processor_counters(powercap: Path) -> list[_Counter]:
    """Returns a counter for each processor package; none where they may not be read."""
    counters = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        is_package = folder.name.count(":") == 1  # the others are parts of one
        if is_package and (folder / "name").read_text().startswith("package"):
            read = partial(_read_number, folder / "energy_uj")
            try:
                turn = _read_number(folder / "max_energy_range_uj")
                counters.append(_Counter(read, turn, read()))
            except OSError:  # most systems let only root read it
                return []
    return counters


def _read_number(file: Path) -> int:
    return int(file.read_text())


def _gpu_counters() -> list[_Counter]:
    """Returns a counter for each GPU that this machine's processes use; none without NVML."""
    try:
        import pynvml
    except ImportError:
        return []
    counters = []
    try:
        pynvml.nvmlInit()
        for number in range(torch.cuda.device_count()):
            uuid = torch.cuda.get_device_properties(number).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

            read = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
            counters.append(_Counter(read, None, read(), microjoules=1000))
    except pynvml.NVMLError:
        return []
    return counters
