"""The place of this process among those that torchrun or accelerate launch started."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

from rich.console import Console

from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.core.processors import num_cores, num_processors

if TYPE_CHECKING:
    import torch

_HIGHEST_PORT = 65535
# What torchrun and accelerate launch put into the environment of the processes they start.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class Place(NamedTuple):
    """Numbers of this process, from 0, and how many processes there are."""

    rank: int
    local_rank: int
    world_size: int


def read_place() -> Place:
    """Returns the place that the launcher put into the environment; without one, the only place.

    Raises:
        UserError: the variables are wrong, as those that another program left behind.
    """
    world_size = _number("WORLD_SIZE", 1, least=1)
    if world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise _wrong(name, f"is not set, but WORLD_SIZE is {world_size}")
        _number("MASTER_PORT", 0, most=_HIGHEST_PORT)
    rank, local_rank = (_number(name, 0, most=world_size - 1) for name in ("RANK", "LOCAL_RANK"))
    return Place(rank, local_rank, world_size)


def choose_device() -> torch.device:
    """Returns the device of this process, and makes it torch's current one: a GPU if there are any.

    Several processes of a machine have a GPU each. For tests and measurements on a machine that has
    fewer, `KIEM_SHARE_GPUS=true` lets processes share them.

    Raises:
        UserError: there are fewer GPUs than processes, or the launcher's variables are wrong.
    """
    import torch  # slow

    local_rank = read_place().local_rank
    if not torch.cuda.is_available() or is_true("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    num_processes = _number("LOCAL_WORLD_SIZE", local_rank + 1, least=local_rank + 1)
    if num_processes > num_gpus and not shares_gpus():
        what = f"{num_processes} processes were started on this machine, which has {num_gpus} GPU"
        fix = (
            f"Give {num_gpus}: --num_processes of accelerate launch, --nproc-per-node of torchrun."
        )
        raise bad_option("the launcher", f"{what}{'' if num_gpus == 1 else 's'}", fix)
    device = torch.device("cuda", local_rank % num_gpus)
    torch.cuda.set_device(device)
    return device


def use_processors(console: Console) -> None:
    """Gives torch and the C++ kernels a thread for each core that this process may use.

    By themselves they take the cores of the machine, whatever a container's quota, and under
    torchrun and accelerate launch the one that OMP_NUM_THREADS then says. What a user has set is
    kept. OpenMP counts for each thread: another one that computes has to call
    torch.set_num_threads(torch.get_num_threads()).

    Args:
        console: shows when a launcher's number is not kept, or may be one, and that a Mac's GPU is
            not used.

    Raises:
        UserError: the launcher's variables are wrong.
    """
    import torch  # slow

    if torch.backends.mps.is_available():
        console.print("computing on the CPU: kiem has no code for Apple's GPU (docs/devices.md)")
    # The processes in which torch compiles layers; it heeds the affinity, but no quota.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, num_processors())))
    number = max(1, num_cores() // _number("LOCAL_WORLD_SIZE", 1, least=1))
    given = os.environ.get("OMP_NUM_THREADS")
    chosen_by = _who_chose_threads()
    differs = given not in (None, str(number)) and choose_device().type == "cpu"
    if chosen_by == "unknown" and differs:
        warn(
            console,
            f"{given} threads, if the launcher chose that: OMP_NUM_THREADS={number} is right",
        )
    if chosen_by == "launcher" and differs:
        console.print(f"{number} threads, not the launcher's {given}; OMP_NUM_THREADS changes that")
    if chosen_by in ("nobody", "launcher"):
        torch.set_num_threads(number)


def _who_chose_threads() -> Literal["nobody", "user", "launcher", "unknown"]:
    if "MKL_NUM_THREADS" in os.environ:
        return "user"
    if "OMP_NUM_THREADS" not in os.environ:
        return "nobody"
    if not any(name in os.environ for name in _LAUNCHED):
        return "user"
    launcher = Path("/proc") / str(os.getppid())
    try:
        # The environment that the launcher was started with, whatever it has added since.
        environment = (launcher / "environ").read_bytes().split(b"\0")
        words = (launcher / "cmdline").read_bytes()
    except OSError:  # not on Linux
        return "unknown"
    has_option = re.search(rb"--num.cpu.threads.per.process", words)
    has_variable = any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment)
    return "user" if has_option or has_variable else "launcher"


def shares_gpus() -> bool:
    """Returns whether processes may share a GPU; NCCL refuses that, gloo does not."""
    return is_true("KIEM_SHARE_GPUS")


def is_true(variable: str) -> bool:
    """Returns whether a variable of the environment is set to true."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def prints_output() -> bool:
    """Returns whether this process prints: the first one of a machine does."""
    try:
        return read_place().local_rank == 0
    except UserError:
        return True


def leave(exit_code: int) -> NoReturn:
    """Ends this process; at once, without Python's finalization, if a launcher started several.

    torch keeps the process group, and gloo's threads, alive until the interpreter ends. A thread
    that frees a tensor during finalization aborts the process, and the launcher reports a finished
    run as failed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(exit_code)
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


@contextlib.contextmanager
def lost_processes(rank: int) -> Iterator[None]:
    """Turns torch's errors about lost processes into a message.

    Raises:
        UserError: another process has died or hangs, or they could not connect.
    """
    from torch.distributed import DistError, DistNetworkError  # slow to import

    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistError) or "gloo/transport" in str(error)):
            raise
        reason = str(error).splitlines()[0]
        what = f"another process has died or hangs ({reason})"
        fix = "Look at its message, and start again: finished work is kept."
        if isinstance(error, DistNetworkError) and "listen" in reason:
            what = f"the processes cannot meet at MASTER_PORT ({reason})"
            fix = "Give the launcher another port: --master-port, or --main_process_port."
        where = f"process {rank}"
        raise UserError(what, where=where, fix=fix, exit_code=ExitCode.PROCESS_LOST) from error


def _number(name: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
    text = os.environ.get(name) or str(default)
    number = int(text) if re.fullmatch(r"[0-9]{1,10}", text) else -1
    if not least <= number <= most:
        raise _wrong(name, f"is {text!r}, not a number from {least} to {most}")
    return number


def _wrong(name: str, what: str) -> UserError:
    fix = "Start several processes with torchrun or accelerate launch, which set it; else remove "
    fix += "RANK, LOCAL_RANK and WORLD_SIZE from the environment."
    return bad_option(f"environment variable {name}", what, fix)
