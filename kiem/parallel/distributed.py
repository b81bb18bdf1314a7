"""The device that this process computes on, and its communication with the other processes.

`accelerate launch` and `torchrun` start one process per device and describe its place in the
environment (RANK, WORLD_SIZE, LOCAL_RANK); under plain `python` there is one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kiem.compute.speed import check_bf16, measure_matrix_flops, prefers_bf16
from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.parallel.launch import (
    choose_device,
    is_true,
    lost_processes,
    read_place,
    shares_gpus,
)

T = TypeVar("T")
Precision = Literal["fp32", "bf16"]

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_POLL_SECONDS = 0.02
# Others wait so long for a process that hashes data or writes a checkpoint; NCCL's own 10 minutes
# would end such a run. A process that has died is noticed at once, by the launcher or gloo, and an
# update that hangs by kiem/training/signals.py.
_TIMEOUT = timedelta(hours=6)
# Plugins of `accelerate config` that kiem does not use, as in its variables ACCELERATE_USE_...
_ACCELERATE_PLUGINS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


@dataclass(frozen=True)
class Distributed:
    """The place of this process among all.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: where this process computes.
        precision: "bf16" for autocast over fp32 weights, else "fp32".
        matrix_flops: measured FLOP/s of matrix products in that precision, of all devices.
        local_rank: number of this process on its machine, from 0.
    """

    rank: int
    world_size: int
    device: torch.device
    precision: Precision
    matrix_flops: float
    local_rank: int = 0

    @property
    def name(self) -> str:
        """The name of the device, shown to users."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU with {torch.get_num_threads()} threads"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its machine, which checks files on its disk."""
        return self.local_rank == 0

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The precision of matrix products."""
        return _DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """Returns the context for forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Adds a tensor over all processes, in place, and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, value: bool) -> bool:
        """Returns whether `value` is true in any process."""
        if self.world_size == 1:
            return value
        return bool(self.all_reduce_sum(self._number(int(value))))

    def broadcast_from_main(self, value: T) -> T:
        """Returns the main process's value in every process; JSON must be able to hold it."""
        if self.world_size == 1:
            return value
        return cast(T, json.loads(self._broadcast_text(json.dumps(value), 0)))

    def all_gather(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank, in every process; as JSON, as above."""
        if self.world_size == 1:
            return [value]
        text = json.dumps(value)
        return [json.loads(self._broadcast_text(text, rank)) for rank in range(self.world_size)]

    def barrier(self) -> None:
        """Waits until every process has called this."""
        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Makes a block fail in all processes when it fails in one, so that none waits in vain.

        For everything that only some processes do, or that may fail in only some. The block must
        not communicate with other processes.

        Raises:
            UserError: that of the block, or of the first process that failed, with its name.
        """
        if self.world_size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, when the others know of it
            failure = error
        if self.any(failure is not None):
            told = self.all_gather(vars(_with_place(failure, self.rank)) if failure else None)
            values = next(values for values in told if values is not None)
            raise failure or UserError(**{**values, "exit_code": ExitCode(values["exit_code"])})

    def _broadcast_text(self, text: str, source: int) -> str:
        """Returns the ASCII text of process `source` in every process."""
        length = self._number(len(text))
        dist.broadcast(length, src=source)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, src=source)
        return bytes(content.tolist()).decode()

    def _number(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=torch.int64, device=self.device)


@contextlib.contextmanager
def init_distributed(precision: Literal["auto", "fp32", "bf16"]) -> Iterator[Distributed]:
    """Joins the process group that the launcher prepared, and leaves it at the end.

    Args:
        precision: "auto" follows `accelerate launch --mixed_precision`, else uses bf16 where the
            device has instructions for it.

    Raises:
        UserError: the device or kiem does not have the precision, `accelerate config` names a
            plugin that kiem does not use, there are fewer GPUs than processes, the launcher's
            variables are wrong, or another process is lost.
    """
    rank, local_rank, world_size = read_place()
    device = choose_device()
    distributed = Distributed(rank, world_size, device, "fp32", 0.0, local_rank)
    try:
        with lost_processes(rank):
            if world_size > 1:
                by_nccl = device.type == "cuda" and not shares_gpus()
                dist.init_process_group(
                    "nccl" if by_nccl else "gloo",
                    store=_meet(device.type, rank, world_size),
                    rank=rank,
                    world_size=world_size,
                    timeout=_TIMEOUT,
                    device_id=device if by_nccl else None,  # NCCL connects now, not when first used
                )
            with distributed.raise_on_all_ranks():
                chosen = _chosen_precision(precision, device)
                if chosen is None:
                    chosen = "bf16" if prefers_bf16(device) else "fp32"
            # The main process decides for all.
            yield with_precision(distributed, distributed.broadcast_from_main(chosen))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def with_precision(distributed: Distributed, precision: Precision) -> Distributed:
    """Returns the same place with another precision; all processes call it alike."""
    # The main process's speed counts for every device.
    flops = measure_matrix_flops(distributed.device, _DTYPES[precision])
    flops = distributed.broadcast_from_main(flops) * distributed.world_size
    return replace(distributed, precision=precision, matrix_flops=flops)


def keep_precision(
    distributed: Distributed, precision: Literal["auto", "fp32", "bf16"], before: Precision
) -> Distributed:
    """Returns the place with the precision that a run had before, if none is chosen now.

    The run may have begun on a machine that prefers another. Raises a UserError if the device does
    not have the precision.
    """
    with distributed.raise_on_all_ranks():
        is_kept = _chosen_precision(precision, distributed.device) is None
        if is_kept and before == "bf16":
            check_bf16(distributed.device)
    is_other = is_kept and before != distributed.precision
    return with_precision(distributed, before) if is_other else distributed


def _with_place(failure: Exception, rank: int) -> UserError:
    """Returns what the other processes raise for a failure: it names the process."""
    place = f"process {rank} on {socket.gethostname()}"
    if isinstance(failure, UserError):
        where = f"{place}: {failure.where}" if failure.where else place
        return UserError(failure.what, where=where, fix=failure.fix, exit_code=failure.exit_code)
    return UserError(
        f"it has failed ({type(failure).__name__}: {failure})",
        where=place,
        fix="Look at its message.",
        exit_code=ExitCode.PROCESS_LOST,
    )


def _meet(kind: str, rank: int, world_size: int) -> Store:
    """Waits for the other processes; returns a part of the launcher's store for this start alone.

    A launcher that restarts processes gives them the store of those that died, with their
    addresses. A process that reads one before its new owner has written it connects to a closed
    port or waits for ever. torch's own count of restarts does not help: after a failure on one
    node, only that node counts. So the main process invents a name, and gives it to those that
    have shown that they are alive by a name of their own.

    Raises:
        UserError: another kind of device than the main process's, as when one machine's driver
            does not work: such processes cannot be joined.
    """
    store, _, _ = next(rendezvous("env://"))
    name = f"{kind}-{uuid.uuid4().hex}"
    if rank > 0:
        store.set(f"kiem/caller/{rank}", name)
        start = store.get(f"kiem/start/{name}").decode()
        store.set(f"kiem/heard/{start}/{rank}", kind)
        _check_kind(rank, kind, start.partition("-")[0])
        return PrefixStore(f"kiem/{start}", store)
    for other in range(1, world_size):
        # The first caller may be a dead process; its successor will replace the name.
        while not store.check([f"kiem/heard/{name}/{other}"]):
            caller = store.get(f"kiem/caller/{other}").decode()
            store.set(f"kiem/start/{caller}", name)
            time.sleep(_POLL_SECONDS)
        _check_kind(other, store.get(f"kiem/heard/{name}/{other}").decode(), kind)
    return PrefixStore(f"kiem/{name}", store)


def _check_kind(rank: int, kind: str, of_main: str) -> None:
    if kind != of_main:
        raise bad_option(
            f"process {rank}",
            f"computes on a {kind}, process 0 on a {of_main}",
            "Check that torch.cuda.is_available() is the same on all machines, or set "
            "ACCELERATE_USE_CPU=true on all.",
        )


def _chosen_precision(
    precision: Literal["auto", "fp32", "bf16"], device: torch.device
) -> Precision | None:
    """Returns the precision of the options or the launcher; None if both leave it open."""
    where = "accelerate config"
    for plugin in _ACCELERATE_PLUGINS:
        if is_true(f"ACCELERATE_USE_{plugin}"):
            fix = "Take it out of the accelerate file, and use --shard."
            raise bad_option(where, f"{plugin} is not used by kiem, which shards by itself", fix)
    if precision == "auto":
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
        if launcher not in ("no", "bf16"):
            what = f"mixed precision {launcher} is not supported"
            raise bad_option(where, what, "Use bf16 or no.")
        if launcher == "no":  # which is also the launcher's own default
            return None
        precision = "bf16"
    if precision == "bf16":
        check_bf16(device)
    return precision
